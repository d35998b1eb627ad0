#!/bin/sh
# Make the virtualenv DIR from the first Python >= 3.11 found, on a bare Debian or macOS.
set -eu
dir=$1
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
if "$dir/bin/python" -c "$new_enough" >/dev/null 2>&1; then
    exit 0 # it is there already; only its packages may have to change
fi
for python in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 \
    /opt/homebrew/bin/python3 /usr/local/bin/python3; do
    if "$python" -c "$new_enough" >/dev/null 2>&1; then
        found=$python
        break
    fi
done
if [ -z "${found:-}" ]; then
    echo "kvmtool needs Python 3.11 or newer; none was found (set PYTHON=/path/to/python3)" >&2
    exit 1
fi
if ! "$found" -c 'import ensurepip' >/dev/null 2>&1; then
    # Debian keeps ensurepip in a package of its own.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        version=$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        apt-get update -qq && apt-get install -y -qq "python$version-venv"
    else
        echo "$found has no ensurepip: on Debian, run 'sudo apt-get install python3-venv' first" >&2
        exit 1
    fi
fi
"$found" -m venv --clear "$dir"
