#!/bin/sh
# Prepares a bare machine with a GPU and no network for `make gpu`, from wheels that lie beside the repository:
#   on a machine with a network:  benchmarks/gpu_setup.sh download WHEELS   (torch for CUDA, and what pyproject.toml names)
#   on the machine with the GPU:  benchmarks/gpu_setup.sh install WHEELS    (into .venv; then `make gpu`)
# Without wheels, `install` takes the Python that is there if it can import torch with CUDA.
set -eu

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }

[ $# -eq 2 ] || usage
what=$1 wheels=$2
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=$(grep '^torch==' constraints.txt | sed 's/+cpu$//')

case $what in
download)
    mkdir -p "$wheels"
    # The CUDA build comes from PyPI; constraints.txt pins the same version of its CPU build.
    grep -v '^torch==' constraints.txt > "$wheels/constraints.txt"
    "$python" -m pip download --dest "$wheels" "$torch" --constraint "$wheels/constraints.txt" \
        'setuptools>=77' wheel '.[dev]'
    ;;
install)
    "$python" -m venv --system-site-packages .venv
    if [ -d "$wheels" ] && ls "$wheels"/*.whl > /dev/null 2>&1; then
        .venv/bin/python -m pip install --no-index --find-links "$wheels" "$torch" 'setuptools>=77' wheel
        .venv/bin/python -m pip install --no-index --find-links "$wheels" --no-build-isolation --editable '.[dev]'
    else
        echo "no wheels in $wheels: using what $python has" >&2
        .venv/bin/python -m pip install --no-index --no-deps --no-build-isolation --editable .
    fi
    touch .venv/.installed
    .venv/bin/python -c 'import torch
assert torch.cuda.is_available(), "torch sees no CUDA device: " + torch.__version__
print(torch.__version__, torch.cuda.get_device_name(), torch.version.cuda)'
    ;;
*) usage ;;
esac
