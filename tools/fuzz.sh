#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# The fuzzers of tests/fuzz, by clang and its libFuzzer (Debian's clang and libclang-rt-dev).
#
#   tools/fuzz.sh build FOLDER              builds FOLDER/contract and FOLDER/reply, with the sanitizers
#   tools/fuzz.sh run contract|reply [...]  builds below build/fuzz and runs on the corpus, further arguments are
#                                           libFuzzer's (-max_total_time=600); finds stay in build/fuzz
#   tools/fuzz.sh merge contract|reply      adds to the corpus what `run` found that reaches other lines of the code
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
compiler=${CLANG:-clang}

case $(uname -m) in
    x86_64) foreign=arm64 ;;
    aarch64) foreign=x86 ;;
    *) echo "kvmneg knows x86-64 and arm64" >&2; exit 1 ;;
esac
# that warning is of KVM's own structures on the stack
flags=(-std=gnu11 -g -O2 -Wall -Wextra -Werror -Wno-gnu-variable-sized-type-not-at-end -fno-omit-frame-pointer
    -fsanitize=fuzzer -fsanitize=address -fsanitize=undefined -fno-sanitize-recover=all "-I$top/csrc" "-I$top/client")

build() {
    local library=()
    for file in "$top"/csrc/*.c; do
        [[ ${file##*/} == "$foreign"* ]] || library+=("$file")
    done
    read -ra json < <(pkg-config --cflags --libs json-c)
    mkdir -p "$1"
    "$compiler" "${flags[@]}" "$top"/tests/fuzz/contract_{fuzzer,mutator}.c "${library[@]}" -o "$1/contract" &
    local other=$!
    # the system as the client sees it is reply_fuzzer.c's
    "$compiler" "${flags[@]}" -Wl,--wrap={socket,connect,recv,kvmneg_contract_open} \
        "$top"/tests/fuzz/reply_{fuzzer,mutator}.c "$top"/client/*.c "${library[@]}" "${json[@]}" -o "$1/reply"
    wait "$other"
}

usage() {
    sed -n 's/^#   //p' "$0" >&2
    exit 2
}

action=${1:-} target=${2:-}
shift 2 || usage
corpus=$top/tests/fuzz/corpus/$target found=$top/build/fuzz/found-$target
case $action:$target in
    build:*)
        build "$target"
        exit
        ;;
    run:contract | merge:contract) most=16384 ;;
    run:reply | merge:reply) most=8192 ;;
    *) usage ;;
esac
build "$top/build/fuzz"
mkdir -p "$found"
cd "$top/build/fuzz"
limits=(-max_len="$most" -rss_limit_mb=1024 -timeout=20 -dict="$top/tests/fuzz/$target.dict")
case $action in
    run) exec "./$target" "${limits[@]}" "$@" "$found" "$corpus" ;;
    merge) exec "./$target" "${limits[@]}" "$@" -use_counters=0 -merge=1 "$corpus" "$found" ;;
esac
