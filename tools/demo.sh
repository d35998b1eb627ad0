#!/bin/sh
# What `make demo` runs: the sample, then the three commands people ask for.
# usage: demo.sh KVMTOOL DIR
set -eu
kvmtool=$1 dir=$2
"$kvmtool" demo "$dir"
export KVMTOOL_KERNEL="$dir/mach_kernel" KVMTOOL_CORE="$dir/core"
for command in "nlist _cdevsw" "read 0x441990 4" "read 0x441990 4 -t x4" procs; do
    printf '\n$ kvmtool %s\n' "$command"
    # shellcheck disable=SC2086  # words are meant to be split
    "$kvmtool" $command
done
printf '\nTo type these yourself:\n  export PATH="%s:$PATH"\n' "$(cd "$(dirname "$kvmtool")" && pwd)"
