// Which instruction set is used.

#include <algorithm>
#include <atomic>

#include "kvkeep_native.h"
#include "ops.h"

#if defined(KVKEEP_HAS_AMX) && defined(__linux__) && !defined(KVKEEP_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvkeep {
namespace {

int best_isa() {
#if defined(__x86_64__)
  // These ask the operating system too, whether it keeps the wide registers.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (!has_avx2) return KVKEEP_PORTABLE;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!has_avx512) return KVKEEP_AVX2;
  const bool has_bf16 =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return has_bf16 ? KVKEEP_AVX512_BF16 : KVKEEP_AVX512;
#else
  return KVKEEP_PORTABLE;
#endif
}

// Whether AMX can be used, too: the processor has it, the operating system keeps its registers (the builtin
// sees both) and lets this process use them, for which Linux wants to be asked.
bool request_amx() {
#if defined(KVKEEP_HAS_AMX) && defined(KVKEEP_EMULATE_AMX)
  return true;
#elif defined(KVKEEP_HAS_AMX) && defined(SYS_arch_prctl)
  if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The tables of what this machine runs, filled once.
struct Tables {
  Tables() : best(best_isa()), isa(best) {
    fill_portable(tables[KVKEEP_PORTABLE]);
#if defined(__x86_64__)
    if (best >= KVKEEP_AVX2) fill_avx2(tables[KVKEEP_AVX2]);
    if (best >= KVKEEP_AVX512) fill_avx512(tables[KVKEEP_AVX512]);
    if (best >= KVKEEP_AVX512_BF16) fill_avx512_bf16(tables[KVKEEP_AVX512_BF16]);
#endif
#if defined(KVKEEP_HAS_AMX)
    if (best >= KVKEEP_AVX512_BF16) fill_amx(tables[KVKEEP_AMX]);
#endif
  }

  Ops tables[KVKEEP_AMX + 1];
  const int best;
  std::atomic<int> isa;
};

Tables &tables() {
  static Tables all;
  return all;
}

// What is used where `isa` is asked for.
int usable_isa(int isa) {
  const int best = tables().best;
  if (isa >= KVKEEP_AMX && best == KVKEEP_AVX512_BF16) {
    static const bool has_amx = request_amx();
    if (has_amx) return KVKEEP_AMX;
  }
  return std::clamp<int>(isa, KVKEEP_PORTABLE, best);
}

}  // namespace

const Ops &ops() { return tables().tables[tables().isa.load(std::memory_order_relaxed)]; }

}  // namespace kvkeep

extern "C" {

int32_t kvkeep_abi(void) { return KVKEEP_ABI; }

int32_t kvkeep_best_isa(void) { return kvkeep::tables().best; }

int32_t kvkeep_use_isa(int32_t isa) {
  const int used = kvkeep::usable_isa(isa);
  kvkeep::tables().isa.store(used, std::memory_order_relaxed);
  return used;
}

}  // extern "C"
