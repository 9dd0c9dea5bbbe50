#!/bin/sh
# Prepares a machine with a GPU and no network for `make gpu`, from wheels that lie beside the repository:
#   where there is a network:  benchmarks/gpu_setup.sh download FOLDER   (WITH_TORCH=1: torch for CUDA and all it needs, 3 GB)
#   where the GPU is:          benchmarks/gpu_setup.sh install FOLDER    (into .venv; then `make gpu`)
# PYTHON is the machine's own python3, whose packages are used too (NEEDED=msgspec: only that is missing there).
# PYTHON_VERSION=3.12: download for another Python than this one.
set -eu

# What tests/test_gpu*.py and benchmarks/gpu.py import, in the versions of constraints.txt where it names them.
NEEDED=${NEEDED:-'numpy msgspec safetensors pyyaml rich markdown-it-py mdurl pygments
pytest pluggy iniconfig packaging'}

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }

[ $# -eq 2 ] || usage
python=${PYTHON:-python3}
mkdir -p "$2"
folder=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."

download() {
    platforms=''
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
        platforms="$platforms --platform ${tag}_x86_64"
    done
    for name in $NEEDED; do
        pinned=$(grep -i "^$name==" constraints.txt || echo "$name")
        # shellcheck disable=SC2086  # the platforms are several words
        "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" $platforms \
            --python-version "${PYTHON_VERSION:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}" "$pinned"
    done
    if [ -n "${WITH_TORCH:-}" ]; then
        "$python" -m pip download --only-binary=:all: --dest "$folder" "$(grep '^torch==' constraints.txt)"
    fi
}

install() {
    "$python" -m venv --system-site-packages .venv
    ls "$folder"/*.whl > /dev/null 2>&1 && .venv/bin/python -m pip install --quiet --no-index --no-deps "$folder"/*.whl
    # As an editable install would, without setuptools.
    pwd > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mbgd.pth"
    touch .venv/.installed
    .venv/bin/python -c 'import mbgd.trainer, torch
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device"
print(torch.__version__, torch.cuda.get_device_name(), torch.version.cuda)'
}

case $1 in
download) download ;;
install) install ;;
*) usage ;;
esac
