#!/bin/sh
# Installs the server into a prefix of its own: the one way, which the Dockerfile takes too.
#
#   deploy/install.sh PREFIX [torch|quickchange]      both steps, or one of them
#
# PREFIX/bin/quickchange is the command. Nothing outside PREFIX is changed, and nothing in it is written to afterwards: it may
# be read-only, and belong to another user than the server's.
#
#   PYTHON       interpreter of the environment; default python3
#   VARIANT      cpu or cuda: which build of torch; default cuda, which is what the package index has for x86-64
#   EXTRAS       what of quickchange; default server. `server,tracing` sends traces as well
#   TORCH_INDEX  where builds for CPUs are; default PyTorch's own index. Empty: pip's index decides
#
# A C++ compiler (g++ 10 or newer) makes the native CPU kernels; without one the server runs, more slowly.
set -eu

prefix=${1:?"usage: deploy/install.sh PREFIX [torch|quickchange]"}
step=${2:-all}
source=$(cd "$(dirname "$0")/.." && pwd)
variant=${VARIANT:-cuda}

# The isolated environment in which pip builds is pinned as well: older and newer versions of pip differ in how.
export PIP_CONSTRAINT="$source/constraints.txt" PIP_BUILD_CONSTRAINT="$source/constraints.txt"
export PIP_DISABLE_PIP_VERSION_CHECK=1

install_torch() {
    test -x "$prefix/bin/python" || "${PYTHON:-python3}" -m venv "$prefix"
    torch=$(grep '^torch==' "$source/constraints.txt")
    case $variant in
        cuda) "$prefix/bin/pip" install --quiet "$torch" ;;
        cpu)
            index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
            "$prefix/bin/pip" install --quiet ${index:+--extra-index-url "$index"} "$torch"
            ;;
        *) echo "error: VARIANT is $variant; give cpu or cuda" >&2; exit 2 ;;
    esac
}

install_quickchange() {
    "$prefix/bin/pip" install --quiet "$source[${EXTRAS:-server}]"
    # A read-only tree cannot keep what Python compiles at the first start.
    "$prefix/bin/python" -m compileall -qq -j 0 "$prefix/lib" || true  # some packages ship templates that are no Python
}

case $step in
    all) install_torch && install_quickchange ;;
    torch) install_torch ;;
    quickchange) install_quickchange ;;
    *) echo "error: no step $step; there are torch and quickchange" >&2; exit 2 ;;
esac
