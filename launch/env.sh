# The environment of training processes on every host, with the reason of each value; to be sourced. What is set before stays.
# Which names reach the hosts of a hostfile stands in launch/environment.py; there they may hold letters, digits and _@+=:,./^- only.

# ---- NCCL: GPUs to each other
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                       # says why a connection fails; INFO for its choice of networks and rings
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}  # a collective over its time limit ends the process: no silent hang
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}  # buffers of collectives are freed at once: less peak memory
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}               # 4 us x 2^22 = 17 s: a switch that reroutes must not end 112 GPUs (default 20: 4 s)
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}            # as often as the hardware can
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-8}  # enough hardware queues that gradient reduction overlaps the backward pass

# Of each cluster's own; unset is right where NCCL finds its way, and `fw doctor` measures whether it does:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interface of the first contact, such as bond0 or eth0, where a host has several networks,
#                                            or where its own name resolves to 127.0.1.1 (gloo would wait for ever)
#   NCCL_IB_HCA=mlx5_0,mlx5_1,...            the adapters next to the GPUs, where storage has adapters of its own; ^mlx5_8 leaves one out
#   NCCL_IB_GID_INDEX=3, NCCL_IB_TC=...      RoCE only: the GID of RoCE v2, and the traffic class that switches keep lossless
#   NCCL_IB_QPS_PER_CONNECTION=4             RoCE with several paths between switches
#   NCCL_IB_DISABLE=1, NCCL_P2P_DISABLE=1    to find a fault by leaving the adapter, or NVLink, out; slow
#   NCCL_DEBUG_SUBSYS=INIT,NET               with NCCL_DEBUG=INFO: only these
#   NCCL_NET_GDR_LEVEL, NCCL_CROSS_NIC, NCCL_NVLS_ENABLE, NCCL_ALGO, NCCL_PROTO, NCCL_TOPO_FILE   only when the vendor says so
#   TORCH_NCCL_TRACE_BUFFER_SIZE=2000        keeps the last collectives for a dump when one hangs

# ---- the processor
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}                # 8 ranks and their loader processes share a host; torch would take every core for each
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}  # its threads do not survive the fork of loader processes

# ---- memory of GPUs
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}  # two clip sizes alternate: without it fragments pile up
