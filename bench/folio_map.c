/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The folio map the plain way: what khod.folio is measured against.
 *
 * One insert per folio, with every refusal of the specification; per order a sparse table of 512-byte bitmaps, two levels
 * of pointers indexed by block number, as an xarray would be. The reader checks what is cheap to check and the digest, by
 * libcrypto, as Python's hashlib does. Built with `cc -O2`, called through ctypes, so that both sides find their input in
 * the same memory.
 */
#include <openssl/evp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
	BLOCK_SHIFT = 12,
	BLOCK_BITS = 1 << BLOCK_SHIFT,
	BITMAP_BYTES = BLOCK_BITS / 8,
	LEAF_SHIFT = 9,
	LEAF_SLOTS = 1 << LEAF_SHIFT,
	PAGE_SHIFT = 12,
	PAGE_BYTES = 1 << PAGE_SHIFT,
	CHUNK_ELEMENTS = 255,
	ORDERS = 52,
	MAX_RANGES = 16,
};

enum refusal {
	OK,
	ORDER_ABOVE_LIMIT,
	UNALIGNED,
	NOT_RAM,
	IN_SCRATCH,
	ALREADY_PRESERVED,
	OVERLAPS,
	EMPTY_RANGE,
	NO_MEMORY,
};

#define MAP_REJECTED UINT64_MAX

struct range {
	uint64_t start, end; /* frames */
};

struct leaf {
	uint64_t *bitmap[LEAF_SLOTS];
};

struct order {
	struct leaf **leaves;
	uint64_t leaf_count; /* room in `leaves` */
	uint64_t bitmaps;
};

struct tracker {
	struct order orders[ORDERS];
	struct range ram[MAX_RANGES], scratch[MAX_RANGES];
	unsigned ram_count, scratch_count, max_order;
	uint64_t present; /* bit o: order o has a bitmap; most have none, and cost nothing */
};

struct element {
	uint64_t phys_start, bitmap;
};

struct chunk {
	uint32_t order, num_elms;
	uint64_t next;
	struct element elements[CHUNK_ELEMENTS];
};

_Static_assert(sizeof(struct chunk) == PAGE_BYTES, "a chunk is one page");

/* `ranges` is ram_count pairs of frames, then scratch_count pairs. */
struct tracker *tracker_new(const uint64_t *ranges, unsigned ram_count, unsigned scratch_count, unsigned max_order)
{
	struct tracker *t = calloc(1, sizeof(*t));

	if (!t || ram_count > MAX_RANGES || scratch_count > MAX_RANGES || max_order >= ORDERS)
		abort();
	memcpy(t->ram, ranges, ram_count * sizeof(struct range));
	memcpy(t->scratch, ranges + 2 * ram_count, scratch_count * sizeof(struct range));
	t->ram_count = ram_count;
	t->scratch_count = scratch_count;
	t->max_order = max_order;
	return t;
}

void tracker_free(struct tracker *t)
{
	for (unsigned o = 0; o < ORDERS; o++) {
		for (uint64_t i = 0; i < t->orders[o].leaf_count; i++) {
			struct leaf *leaf = t->orders[o].leaves[i];

			for (unsigned slot = 0; leaf && slot < LEAF_SLOTS; slot++)
				free(leaf->bitmap[slot]);
			free(leaf);
		}
		free(t->orders[o].leaves);
	}
	free(t);
}

static uint64_t *lookup(const struct order *o, uint64_t block)
{
	uint64_t i = block >> LEAF_SHIFT;

	if (i >= o->leaf_count || !o->leaves[i])
		return NULL;
	return o->leaves[i]->bitmap[block & (LEAF_SLOTS - 1)];
}

static uint64_t *lookup_or_allocate(struct order *o, uint64_t block)
{
	uint64_t i = block >> LEAF_SHIFT;
	uint64_t **slot;

	if (i >= o->leaf_count) {
		uint64_t count = i + 1 > 2 * o->leaf_count ? i + 1 : 2 * o->leaf_count;
		struct leaf **leaves = realloc(o->leaves, count * sizeof(*leaves));

		if (!leaves)
			return NULL;
		memset(leaves + o->leaf_count, 0, (count - o->leaf_count) * sizeof(*leaves));
		o->leaves = leaves;
		o->leaf_count = count;
	}
	if (!o->leaves[i]) {
		o->leaves[i] = calloc(1, sizeof(struct leaf));
		if (!o->leaves[i])
			return NULL;
	}
	slot = &o->leaves[i]->bitmap[block & (LEAF_SLOTS - 1)];
	if (!*slot) {
		*slot = calloc(1, BITMAP_BYTES);
		o->bitmaps += *slot != NULL;
	}
	return *slot;
}

static int test(const uint64_t *bitmap, unsigned bit)
{
	return bitmap[bit / 64] >> (bit % 64) & 1;
}

/* Whether any folio of `o` is among its frames first..last. */
static int any_between(const struct order *o, uint64_t first, uint64_t last)
{
	while (first <= last) {
		const uint64_t *bitmap = lookup(o, first >> BLOCK_SHIFT);
		uint64_t stop = (first | (BLOCK_BITS - 1)) < last ? (first | (BLOCK_BITS - 1)) : last;

		for (; bitmap && first <= stop; first++)
			if (test(bitmap, first & (BLOCK_BITS - 1)))
				return 1;
		first = stop + 1;
	}
	return 0;
}

static int overlaps_other_order(const struct tracker *t, uint64_t pfn, unsigned order)
{
	for (uint64_t rest = t->present & ~(UINT64_C(1) << order); rest; rest &= rest - 1) {
		unsigned other = (unsigned)__builtin_ctzll(rest);
		const struct order *o = &t->orders[other];
		uint64_t frame = pfn >> other;

		if (other > order) {
			const uint64_t *bitmap = lookup(o, frame >> BLOCK_SHIFT);

			if (bitmap && test(bitmap, frame & (BLOCK_BITS - 1)))
				return 1;
		} else if (any_between(o, frame, frame + (UINT64_C(1) << (order - other)) - 1)) {
			return 1;
		}
	}
	return 0;
}

static enum refusal check_ground(const struct tracker *t, uint64_t pfn, uint64_t end)
{
	unsigned i = 0;

	while (i < t->ram_count && !(t->ram[i].start <= pfn && end <= t->ram[i].end))
		i++;
	if (i == t->ram_count)
		return NOT_RAM;
	for (i = 0; i < t->scratch_count; i++)
		if (pfn < t->scratch[i].end && t->scratch[i].start < end)
			return IN_SCRATCH;
	return OK;
}

int tracker_preserve(struct tracker *t, uint64_t pfn, unsigned order)
{
	uint64_t frame = pfn >> order;
	enum refusal refusal;
	uint64_t *bitmap;

	if (order > t->max_order)
		return ORDER_ABOVE_LIMIT;
	if (frame << order != pfn)
		return UNALIGNED;
	refusal = check_ground(t, pfn, pfn + (UINT64_C(1) << order));
	if (refusal)
		return refusal;
	if (overlaps_other_order(t, pfn, order))
		return OVERLAPS;
	bitmap = lookup_or_allocate(&t->orders[order], frame >> BLOCK_SHIFT);
	if (!bitmap)
		return NO_MEMORY;
	if (test(bitmap, frame & (BLOCK_BITS - 1)))
		return ALREADY_PRESERVED;
	t->present |= UINT64_C(1) << order;
	bitmap[frame % BLOCK_BITS / 64] |= UINT64_C(1) << (frame % 64);
	return OK;
}

int tracker_preserve_array(struct tracker *t, const uint64_t *pfns, uint64_t count, unsigned order)
{
	for (uint64_t i = 0; i < count; i++) {
		int refusal = tracker_preserve(t, pfns[i], order);

		if (refusal)
			return refusal;
	}
	return OK;
}

/* The fewest naturally aligned folios. */
int tracker_preserve_range(struct tracker *t, uint64_t start, uint64_t end)
{
	if (end <= start)
		return EMPTY_RANGE;
	while (start < end) {
		unsigned order = start ? (unsigned)__builtin_ctzll(start) : t->max_order;
		unsigned fits = 63 - (unsigned)__builtin_clzll(end - start);
		int refusal;

		order = order < fits ? order : fits;
		order = order < t->max_order ? order : t->max_order;
		refusal = tracker_preserve(t, start, order);
		if (refusal)
			return refusal;
		start += UINT64_C(1) << order;
	}
	return OK;
}

uint64_t tracker_bitmaps(const struct tracker *t)
{
	uint64_t bitmaps = 0;

	for (unsigned o = 0; o < ORDERS; o++)
		bitmaps += t->orders[o].bitmaps;
	return bitmaps;
}

/*
 * Write the map into `pages`, memory that lies at physical `base` in one run: all chunks first, then the bitmaps, eight to
 * a page. Returns the pages used.
 */
uint64_t tracker_serialize(const struct tracker *t, uint8_t *pages, uint64_t base)
{
	uint64_t chunks = 0, bitmap_at, chunk_at = 0;
	struct chunk *chunk = NULL;

	for (unsigned o = 0; o < ORDERS; o++)
		chunks += (t->orders[o].bitmaps + CHUNK_ELEMENTS - 1) / CHUNK_ELEMENTS;
	bitmap_at = chunks * PAGE_BYTES;
	for (unsigned o = 0; o < ORDERS; o++) {
		const struct order *order = &t->orders[o];

		if (chunk && order->bitmaps)
			chunk = NULL;
		for (uint64_t block = 0; block < order->leaf_count << LEAF_SHIFT; block++) {
			const uint64_t *bitmap = lookup(order, block);

			if (!bitmap)
				continue;
			if (!chunk || chunk->num_elms == CHUNK_ELEMENTS) {
				if (chunk_at)
					((struct chunk *)(pages + chunk_at - PAGE_BYTES))->next = base + chunk_at;
				chunk = (struct chunk *)(pages + chunk_at);
				memset(chunk, 0, PAGE_BYTES);
				chunk->order = o;
				chunk_at += PAGE_BYTES;
			}
			chunk->elements[chunk->num_elms].phys_start = block << (BLOCK_SHIFT + PAGE_SHIFT + o);
			chunk->elements[chunk->num_elms++].bitmap = base + bitmap_at;
			memcpy(pages + bitmap_at, bitmap, BITMAP_BYTES);
			bitmap_at += BITMAP_BYTES;
		}
	}
	return (bitmap_at + PAGE_BYTES - 1) / PAGE_BYTES;
}

/* A map in memory that lies at physical `base` in one run of `length` bytes. */
struct map {
	const uint8_t *bytes;
	uint64_t base, length;
	unsigned max_order;
};

/* `size` bytes at a physical address, which must be aligned to `size`; NULL where there are none of the map's. */
static const void *at(const struct map *m, uint64_t address, uint64_t size)
{
	uint64_t offset = address - m->base;

	if (address % size || address < m->base || offset >= m->length || m->length - offset < size)
		return NULL;
	return m->bytes + offset;
}

/* One chunk against the one before it: 0 unless its header, its elements and their places are what they may be. */
static int chunk_is_good(const struct map *m, const struct chunk *chunk, const struct chunk *before)
{
	unsigned shift;

	if (!chunk->num_elms || chunk->num_elms > CHUNK_ELEMENTS || chunk->order > m->max_order)
		return 0;
	if (before && (chunk->order < before->order ||
		       (chunk->order == before->order && before->num_elms != CHUNK_ELEMENTS)))
		return 0;
	shift = BLOCK_SHIFT + PAGE_SHIFT + chunk->order;
	for (unsigned i = 0; i < chunk->num_elms; i++) {
		uint64_t start = chunk->elements[i].phys_start;

		if (shift < 64 ? start & ((UINT64_C(1) << shift) - 1) : start)
			return 0;
		if (i && start <= chunk->elements[i - 1].phys_start)
			return 0;
		if (!at(m, chunk->elements[i].bitmap, BITMAP_BYTES))
			return 0;
	}
	return !before || before->order != chunk->order ||
	       chunk->elements[0].phys_start > before->elements[CHUNK_ELEMENTS - 1].phys_start;
}

/* Whether a bitmap holds a folio, and each of them lies in RAM and outside of scratch. */
static int folios_are_good(const struct tracker *ground, const uint64_t *bitmap, uint64_t phys_start, unsigned order)
{
	uint64_t any = 0;

	for (unsigned word = 0; word < BLOCK_BITS / 64; word++) {
		any |= bitmap[word];
		for (uint64_t bits = bitmap[word]; bits; bits &= bits - 1) {
			uint64_t bit = word * 64 + (unsigned)__builtin_ctzll(bits);
			uint64_t pfn = (phys_start >> PAGE_SHIFT) + (bit << order);

			if (check_ground(ground, pfn, pfn + (UINT64_C(1) << order)))
				return 0;
		}
	}
	return any != 0;
}

/*
 * Walk the list once: each chunk and then its bitmaps into the digest, which must come out as `sha256`; every folio must lie
 * where one may. Whether a page of the map is used twice, or two folios overlap, is not looked at.
 */
static int map_is_good(const struct tracker *ground, const struct map *m, uint64_t address, const uint8_t *sha256,
		       EVP_MD_CTX *context)
{
	const struct chunk *chunk, *before = NULL;
	uint64_t left = m->length / PAGE_BYTES; /* so that a cycle ends */
	uint8_t digest[EVP_MAX_MD_SIZE];

	if (!EVP_DigestInit_ex(context, EVP_sha256(), NULL))
		return 0;
	for (; address; address = chunk->next, before = chunk) {
		chunk = at(m, address, PAGE_BYTES);
		if (!chunk || !left-- || !chunk_is_good(m, chunk, before))
			return 0;
		EVP_DigestUpdate(context, chunk, PAGE_BYTES);
		for (unsigned i = 0; i < chunk->num_elms; i++) {
			const void *bitmap = at(m, chunk->elements[i].bitmap, BITMAP_BYTES);

			if (!folios_are_good(ground, bitmap, chunk->elements[i].phys_start, chunk->order))
				return 0;
			EVP_DigestUpdate(context, bitmap, BITMAP_BYTES);
		}
	}
	return EVP_DigestFinal_ex(context, digest, NULL) && !memcmp(digest, sha256, 32);
}

/*
 * Every folio of the map at physical `address` in `pages`, `page_count` of them in one run from `base` on, into `pfns`;
 * returns their number, or MAP_REJECTED. `ground` says where folios may lie. Nothing is written before the whole map is
 * accepted.
 */
uint64_t map_read(const struct tracker *ground, const uint8_t *pages, uint64_t base, uint64_t page_count, uint64_t address,
		  const uint8_t *sha256, uint64_t *pfns)
{
	struct map m = { pages, base, page_count * PAGE_BYTES, ground->max_order };
	EVP_MD_CTX *context = EVP_MD_CTX_new();
	int good = context && map_is_good(ground, &m, address, sha256, context);
	uint64_t count = 0;

	EVP_MD_CTX_free(context);
	if (!good)
		return MAP_REJECTED;
	while (address) {
		const struct chunk *chunk = at(&m, address, PAGE_BYTES);

		for (unsigned i = 0; i < chunk->num_elms; i++) {
			const struct element *element = &chunk->elements[i];
			const uint64_t *bitmap = at(&m, element->bitmap, BITMAP_BYTES);
			uint64_t first = element->phys_start >> PAGE_SHIFT;

			for (unsigned word = 0; word < BLOCK_BITS / 64; word++)
				for (uint64_t bits = bitmap[word]; bits; bits &= bits - 1) {
					uint64_t bit = word * 64 + (unsigned)__builtin_ctzll(bits);

					pfns[count++] = first + (bit << chunk->order);
				}
		}
		address = chunk->next;
	}
	return count;
}
