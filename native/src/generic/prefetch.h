// Asking for memory before it is read; `Isa` as in lanes.h.

#ifndef KVKEEP_GENERIC_PREFETCH_H
#define KVKEEP_GENERIC_PREFETCH_H

#include <cstddef>
#include <cstdint>

namespace kvkeep {

// Into the second level cache: the first one takes only as many lines at a time as plain loads do.
template <class Isa>
void prefetch_ahead(const void *place, std::ptrdiff_t ahead) {
  __builtin_prefetch(static_cast<const std::uint8_t *>(place) + ahead, 0, 2);
}

}  // namespace kvkeep

#endif
