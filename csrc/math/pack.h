// Small integers in bytes: the first element in the lowest bits.
#pragma once
#include "layout.h"

namespace qk {

QK_HD uint8_t pack_byte(const uint8_t* q, int64_t count, int bits) {
  uint32_t byte = 0;
  for (int64_t k = 0; k < count; ++k) byte |= (uint32_t(q[k]) & ((1u << bits) - 1u)) << (k * bits);
  return uint8_t(byte);
}

// Field k of a byte, sign-extended where the levels are signed; the caller stores it as int8 or uint8.
QK_HD uint8_t unpack_field(uint8_t byte, int k, int bits, bool is_signed) {
  const uint32_t mask = (1u << bits) - 1u, field = (uint32_t(byte) >> (k * bits)) & mask;
  return uint8_t(is_signed && (field >> (bits - 1)) ? field | ~mask : field);
}

}  // namespace qk
