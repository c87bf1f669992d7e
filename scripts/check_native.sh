#!/bin/sh
# Lint the C++ sources and run their stress test under sanitizers: check_native.sh [NUM_SEEDS]
# Needs g++, and cmake, ninja, clang-tidy and a python with the development tools in PATH. Builds below
# build/.
set -eu

num_seeds=${1:-12}
num_cpus=$(getconf _NPROCESSORS_ONLN)

cmake -S native -B build/lint -G Ninja -DKVKEEP_STRICT=ON >/dev/null
cmake --build build/lint

# The linker keeps one copy of a weak function: that of an instruction set could end up in portable code.
if find build/lint -path '*/a[vm]x*.o' -exec nm -A --demangle {} + | grep ' W '; then
    echo "native: the functions above are compiled for one instruction set and visible to others" >&2
    exit 1
fi

# clang has neither omp.h, where GCC's goes last so that its intrinsics do not replace clang's, nor the
# builtin, whose arguments are what there is to check.
omp_folder=$(dirname "$(g++ -print-file-name=include/omp.h)")
find native/src -name '*.cpp' -print0 |
    xargs -0 -n 1 -P "$num_cpus" clang-tidy --quiet -p build/lint \
        --extra-arg="-idirafter$omp_folder" --extra-arg='-D__builtin_shuffle(vector,...)=(vector)'

# Sanitizers of older compilers give up where the kernel spreads addresses widely (vm.mmap_rnd_bits=32).
without_randomized_addresses() { # COMMAND ...
    if setarch -R true 2>/dev/null; then
        setarch -R "$@"
    else
        "$@"
    fi
}

# AMX is emulated: what its instructions read and write is hidden from sanitizers, and few machines have it.
stress() { # SANITIZER NUM_SEEDS
    cmake -S native -B "build/$1" -G Ninja -DKVKEEP_SANITIZE="$1" -DKVKEEP_EMULATE_AMX=ON >/dev/null
    cmake --build "build/$1" --target kvkeep_stress
    without_randomized_addresses "build/$1/kvkeep_stress" 0 "$2"
}

stress address,undefined "$num_seeds"
stress thread $((num_seeds / 2))

# The accuracy of emulated AMX, against attention in double precision.
cmake -S native -B build/emulated -G Ninja -DKVKEEP_EMULATE_AMX=ON >/dev/null
cmake --build build/emulated
KVKEEP_NATIVE_LIBRARY="$PWD/build/emulated/libkvkeep_kernels.so" \
    python -m pytest -q -k amx tests/parity/test_amx_parity.py tests/properties/test_native_attention.py
