// SPDX-License-Identifier: Apache-2.0
/*
 * checksum.c - XXH64 (seed 0), by its specification:
 * https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. It guards against
 * damage, not against malice; some 10 GB/s without any instruction set of its own.
 */
#include "internal.h"

#define P1 0x9E3779B185EBCA87u
#define P2 0xC2B2AE3D27D4EB4Fu
#define P3 0x165667B19E3779F9u
#define P4 0x85EBCA77C2B2AE63u
#define P5 0x27D4EB2F165667C5u

static uint64_t rotl(uint64_t v, int n)
{
	return v << n | v >> (64 - n);
}

static uint64_t le64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, 8);
	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? v : __builtin_bswap64(v);
}

static uint32_t le32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, 4);
	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? v : __builtin_bswap32(v);
}

static uint64_t round64(uint64_t acc, uint64_t lane)
{
	return rotl(acc + lane * P2, 31) * P1;
}

static uint64_t merge(uint64_t acc, uint64_t lane)
{
	return (acc ^ round64(0, lane)) * P1 + P4;
}

static uint64_t stripes(const uint8_t **p, const uint8_t *end)
{
	uint64_t a = P1 + P2, b = P2, c = 0, d = 0 - P1, acc;

	for (; end - *p >= 32; *p += 32) {
		a = round64(a, le64(*p));
		b = round64(b, le64(*p + 8));
		c = round64(c, le64(*p + 16));
		d = round64(d, le64(*p + 24));
	}
	acc = rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18);
	return merge(merge(merge(merge(acc, a), b), c), d);
}

uint64_t ms_xxh64(const uint8_t *p, size_t len)
{
	const uint8_t *end = p + len;
	uint64_t acc = (len >= 32 ? stripes(&p, end) : P5) + len;

	for (; end - p >= 8; p += 8)
		acc = rotl(acc ^ round64(0, le64(p)), 27) * P1 + P4;
	if (end - p >= 4) {
		acc = rotl(acc ^ le32(p) * P1, 23) * P2 + P3;
		p += 4;
	}
	for (; p < end; p++)
		acc = rotl(acc ^ *p * P5, 11) * P1;
	acc = (acc ^ acc >> 33) * P2;
	acc = (acc ^ acc >> 29) * P3;
	return acc ^ acc >> 32;
}
