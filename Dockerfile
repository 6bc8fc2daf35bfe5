# The image of a node: training, and ssh logins on port 2222 for launches by hostfile.
#   docker build --tag fw-train --build-arg REVISION="$(git describe --always --dirty --tags)" --build-arg USER_ID="$(id -u)" .
# docs/cluster.md tells how to start it on one machine and on a cluster.

# 12.6.3 has cuBLAS 12.6.4: bf16 products on the H20 crash before 12.4.5.8. Any Debian or Ubuntu with Python 3.11 or newer will do,
# for torch's wheels bring the CUDA libraries they were built with.
ARG BASE_IMAGE=nvidia/cuda
ARG BASE_TAG=12.6.3-base-ubuntu24.04
FROM ${BASE_IMAGE}:${BASE_TAG}

ARG TORCH=2.13.0
# Empty: pip's own index, whose builds since 2.11 are for CUDA 13 and need driver 580 or newer. For older drivers give the address of
# PyTorch's index of CUDA 12.6 builds (cu126; PyTorch's page on installing shows it), which match the base above.
ARG TORCH_INDEX=
# Who owns what a run writes into mounted folders.
ARG USER_ID=1000
ARG GROUP_ID=1000

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Packages of a distribution have no versions to pin: old ones vanish from its servers. Host keys that the ssh server's package makes
# would be the same in every container: the entry point makes them. Recent Ubuntu images give number 1000 to a user of their own.
# hadolint ignore=DL3008
RUN if [ "$USER_ID" = 0 ]; then echo "USER_ID=0: the image is not for root; give the number of another user" >&2; exit 1; fi \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates iproute2 openssh-client openssh-server pdsh python3 python3-venv tini \
    && apt-get clean && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && if holder=$(getent passwd "$USER_ID" | cut -d: -f1); then userdel --remove "$holder"; fi \
    && if ! getent group "$GROUP_ID"; then groupadd --gid "$GROUP_ID" fw; fi \
    && useradd --uid "$USER_ID" --gid "$GROUP_ID" --create-home --shell /bin/bash fw

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/fw_train
RUN python3 -m venv .venv \
    && .venv/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$TORCH"
# What training and encoding need, in the versions of the tests; what stands behind "# checks" stays out.
COPY requirements.txt ./
RUN sed '/^# checks/,$d; /^torch==/d' requirements.txt > /tmp/requirements.txt \
    && DS_BUILD_OPS=0 .venv/bin/pip install --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY . ./
# Checkpoints and logs name the code they came from; an image has no repository to ask. The last line tells launch/venv.sh that
# nothing is left to install.
ARG REVISION=unknown
RUN .venv/bin/pip install --no-deps --editable . \
    && printf '%s\n' "$REVISION" > fw_train/revision.txt \
    && cp launch/docker/ssh_config /etc/ssh/ssh_config.d/fw.conf \
    && install --directory --owner="$USER_ID" --group="$GROUP_ID" data models outputs \
    && install --directory --owner="$USER_ID" --group="$GROUP_ID" --mode=700 /run/fw_ssh \
    && touch ".venv/installed-$(cat requirements.txt pyproject.toml | sha256sum | cut -c1-16)"

ENV PATH=/opt/fw_train/.venv/bin:$PATH \
    PDSH_RCMD_TYPE=ssh \
    PYTHONUNBUFFERED=1
USER ${USER_ID}:${GROUP_ID}
EXPOSE 2222
# A node is well when a launch could log in.
HEALTHCHECK --interval=60s --timeout=10s --start-period=10s \
    CMD ["/opt/fw_train/launch/docker/entrypoint.sh", "healthy"]
ENTRYPOINT ["tini", "--", "/opt/fw_train/launch/docker/entrypoint.sh"]
CMD ["node"]

RUN fw doctor --import
