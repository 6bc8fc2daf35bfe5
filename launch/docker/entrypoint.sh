#!/usr/bin/env bash
# Entry point of the image.
#   node          waits for ssh logins, which a hostfile launch needs on every host; the image's default
#   healthy       whether such a node can be logged in to
#   COMMAND ...   runs it; where keys were handed over, it can log in to the nodes
# Keys are handed over as a folder at /run/secrets/fw_ssh (or $FW_SSH_KEYS), the same one for all nodes:
#   id_ed25519        nodes log in to each other with it: ssh-keygen -t ed25519 -N '' -f FOLDER/id_ed25519
#   authorized_keys   further public keys that may log in; not needed
# Host keys are made at every start. The shared key signs them, so that nodes know each other for sure and nothing is stored.
set -euo pipefail

keys=${FW_SSH_KEYS:-/run/secrets/fw_ssh}
here=/run/fw_ssh

fail() {
    echo "entrypoint.sh: $*" >&2
    exit 2
}

prepare_ssh() {
    [ -r "$keys/id_ed25519" ] || fail "$keys/id_ed25519 cannot be read by user $(id -u). Mount the folder with the nodes' key there" \
        "(docker run --volume FOLDER:$keys:ro); its files must belong to that user: docker build --build-arg USER_ID=\$(id -u)"
    umask 077
    rm -f "$here"/*
    cp "$keys/id_ed25519" "$here/id_ed25519"
    ssh-keygen -y -P '' -f "$here/id_ed25519" > "$here/id_ed25519.pub" ||
        fail "$keys/id_ed25519 is no private key, or has a passphrase. Make one: ssh-keygen -t ed25519 -N '' -f FOLDER/id_ed25519"
    cp "$here/id_ed25519.pub" "$here/authorized_keys"
    [ ! -r "$keys/authorized_keys" ] || cat "$keys/authorized_keys" >> "$here/authorized_keys"
    printf '@cert-authority fw-node %s\n' "$(cut -d' ' -f1,2 "$here/id_ed25519.pub")" > "$here/known_hosts"
}

serve() {
    ssh-keygen -q -t ed25519 -N '' -C "$(hostname)" -f "$here/host_key"
    ssh-keygen -q -s "$here/id_ed25519" -I "$(hostname)" -h -n fw-node "$here/host_key.pub"
    # sshd gives logins nothing of the container's environment; without these they would not find the programs.
    local name places=""
    for name in PATH LD_LIBRARY_PATH PYTHONPATH; do places+="${!name:+$name=${!name} }"; done
    exec /usr/sbin/sshd -D -e -f "$(dirname "$0")/sshd_config" -o "SetEnv=$places"
}

case ${1:-node} in
node)
    prepare_ssh
    serve
    ;;
healthy) [ ! -e "$here/host_key" ] || exec ssh -o ConnectTimeout=5 127.0.0.1 true ;;
*)
    [ ! -d "$keys" ] || prepare_ssh
    exec "$@"
    ;;
esac
