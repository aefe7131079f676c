// SPDX-License-Identifier: Apache-2.0
/*
 * crc32.c - CRC-32 of IEEE 802.3 (zlib's crc32), for KV blocks: a table of zlib's
 * kind makes 1 to 3 GB/s, carry-less multiplication (x86: PCLMULQDQ) or an
 * instruction of its own (arm64: CRC32) five times as much.
 *
 * The folding is that of Gopal et al., "Fast CRC Computation for Generic Polynomials
 * Using PCLMULQDQ Instruction", Intel 2009: four lanes of 16 bytes, each multiplied by
 * x^(4*128) mod P while it is carried over the next four; then the lanes into one, one
 * into 64 bits, and a Barrett reduction. Constants are bit-reflected, as the data is.
 */
#include "internal.h"

/* x^n mod P, reflected, times x: what carries 64 bits over a distance of n bits */
#define X_4_128_HI 0x154442bd4ull /* n = 4*128 + 32 */
#define X_4_128_LO 0x1c6e41596ull /* n = 4*128 - 32 */
#define X_128_HI 0x1751997d0ull   /* n = 128 + 32 */
#define X_128_LO 0x0ccaa009eull   /* n = 128 - 32 */
#define X_64 0x163cd6124ull       /* n = 64 */
#define P_REFLECTED 0x1db710641ull
#define MU 0x1f7011641ull /* x^64 div P */

/* The last bytes, bit by bit: at most 63 of a block of megabytes. */
static uint32_t crc_bits(uint32_t crc, const uint8_t *p, size_t size)
{
	while (size--) {
		crc ^= *p++;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (0xedb88320u & -(crc & 1));
	}
	return crc;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("pclmul,sse4.1")))

static bool have_fast(void)
{
	return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

TARGET static inline __m128i load(const uint8_t *p)
{
	return _mm_loadu_si128((const __m128i *)p);
}

/* `lane` carried over the distance of `by`, and what lies there. */
TARGET static inline __m128i fold(__m128i lane, __m128i by, __m128i next)
{
	__m128i low = _mm_clmulepi64_si128(lane, by, 0x00),
		high = _mm_clmulepi64_si128(lane, by, 0x11);

	return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* 128 bits to the 32 of the CRC. */
TARGET static uint32_t reduce(__m128i all)
{
	const __m128i by128 = _mm_set_epi64x(X_128_LO, X_128_HI), by64 = _mm_set_epi64x(0, X_64);
	const __m128i barrett = _mm_set_epi64x(MU, P_REFLECTED),
		      low32 = _mm_setr_epi32(~0, 0, ~0, 0);
	__m128i rest =
		    _mm_xor_si128(_mm_srli_si128(all, 8), _mm_clmulepi64_si128(all, by128, 0x10)),
		quotient;

	rest = _mm_xor_si128(_mm_srli_si128(rest, 4),
			     _mm_clmulepi64_si128(_mm_and_si128(rest, low32), by64, 0x00));
	quotient = _mm_clmulepi64_si128(_mm_and_si128(rest, low32), barrett, 0x10);
	quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low32), barrett, 0x00);
	return (uint32_t)_mm_extract_epi32(_mm_xor_si128(rest, quotient), 1);
}

/* Of whole 16 bytes, 64 at least. */
TARGET static uint32_t crc_fast(uint32_t crc, const uint8_t *p, size_t size)
{
	const __m128i by4 = _mm_set_epi64x(X_4_128_LO, X_4_128_HI),
		      by1 = _mm_set_epi64x(X_128_LO, X_128_HI);
	__m128i a = _mm_xor_si128(load(p), _mm_cvtsi32_si128((int)crc));
	__m128i b = load(p + 16), c = load(p + 32), d = load(p + 48);

	for (p += 64, size -= 64; size >= 64; p += 64, size -= 64) {
		a = fold(a, by4, load(p));
		b = fold(b, by4, load(p + 16));
		c = fold(c, by4, load(p + 32));
		d = fold(d, by4, load(p + 48));
	}
	a = fold(fold(fold(a, by1, b), by1, c), by1, d);
	for (; size >= 16; p += 16, size -= 16)
		a = fold(a, by1, load(p));
	return reduce(a);
}

#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

static bool have_fast(void)
{
	return getauxval(AT_HWCAP) & HWCAP_CRC32;
}

__attribute__((target("+crc"))) static uint32_t crc_fast(uint32_t crc, const uint8_t *p,
							 size_t size)
{
	for (uint64_t v; size >= 8; p += 8, size -= 8) {
		memcpy(&v, p, 8);
		crc = __crc32d(crc, v);
	}
	return crc;
}

#else

static bool have_fast(void)
{
	return false;
}

static uint32_t crc_fast(uint32_t crc, const uint8_t *p, size_t size)
{
	return crc_bits(crc, p, size);
}
#endif

int ms_tcp_crc32(const void *data, size_t size, uint32_t *crc)
{
	const uint8_t *p = data;
	size_t whole = size < 64 ? 0 : size & ~(size_t)15;
	uint32_t state = ~0u;

	if (!have_fast())
		return -EOPNOTSUPP;
	if (whole)
		state = crc_fast(state, p, whole);
	*crc = ~crc_bits(state, p + whole, size - whole);
	return 0;
}
