# Makes or reuses .venv and installs what requirements.txt names; to be sourced from the top of the checkout.

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$0: Python 3.11 or newer is needed, $("$python" --version) found; set PYTHON=/path/to/python3.11" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# Reinstall only when what is to be installed has changed.
stamp=.venv/installed-$(cat requirements.txt pyproject.toml | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (a few minutes the first time)"
    # None of DeepSpeed's own kernels is used on a CPU.
    DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --requirement requirements.txt
    .venv/bin/python -m pip install --quiet --no-deps --editable .
    rm -f .venv/installed-*
    touch "$stamp"
fi
