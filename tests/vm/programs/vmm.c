/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * vmm BYTES: a VMM that the initrd starts, with one guest, which does nothing but to write the time behind its memory, as that
 * of guest.py does. Its memory is descriptor 3. It tells the test as soon as there is anybody to tell: when the last write in
 * the old kernel was, when main() began, when it could write again, when every byte was compared, and whether all were as
 * content.py makes them. If it is given QEMU's edu device too (device_guest.py), it has that read what the old kernel left for
 * it behind the memory, and write it next to that, by the IOVAs of the old kernel; and tells when that was done.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum { FD = 3, PAGE = 4096, CHUNK = 1 << 24 };

/* As device_guest.py has it: IOVA of the page behind the memory, and where in it there is a word, and room for one. */
enum { IOVA = 0x1000000, WORD = 1024, ROOM = 2048, LENGTH = 64 };

/* QEMU, docs/specs/edu.rst: registers, commands, and its own memory as the device counts it. */
enum { DMA_FROM = 0x80 / 8, DMA_TO, DMA_COUNT, DMA_COMMAND, START = 1, TO_RAM = 2, OWN = 0x40000 };

/* Where the host's root file system is, whatever ours is. */
static const char TOLD[] = "/proc/1/root/run/khod-lab.sock";

static int filled(const uint64_t *words, size_t size)
{
	for (size_t at = 0; at < size; at += 8) {
		size_t in = at % CHUNK;
		uint64_t expected = in % PAGE == 0 ? in / PAGE : in == 8 ? at - 8 : 0;

		if (words[at / 8] != expected)
			return 0;
	}
	return 1;
}

static int device(void)
{
	char names[256];
	const char *given = getenv("LISTEN_FDNAMES");
	int fd = FD;

	snprintf(names, sizeof(names), "%s", given ? given : "");
	for (char *name = strtok(names, ":"); name; name = strtok(NULL, ":"), fd++)
		if (!strcmp(name, "edu/device"))
			return fd;
	return -1;
}

static void dma(volatile uint64_t *registers, uint64_t from, uint64_t to, uint64_t command)
{
	struct timespec pause = { .tv_nsec = 1000000 };

	registers[DMA_FROM] = from;
	registers[DMA_TO] = to;
	registers[DMA_COUNT] = LENGTH;
	registers[DMA_COMMAND] = command | START;
	while (registers[DMA_COMMAND] & START)
		nanosleep(&pause, NULL);
}

/* Whether the device reads and writes as it did. */
static int works(int fd, char *page)
{
	struct vfio_region_info bar = { .argsz = sizeof(bar), .index = VFIO_PCI_BAR0_REGION_INDEX };
	volatile uint64_t *registers;

	if (ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &bar))
		return 0;
	registers = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)bar.offset);
	if (registers == MAP_FAILED)
		return 0;
	memset(page + ROOM, 0, LENGTH);
	dma(registers, IOVA + WORD, OWN, 0);
	dma(registers, OWN, IOVA + ROOM, TO_RAM);
	return page[WORD] && !memcmp(page + WORD, page + ROOM, LENGTH);
}

static int tell(const char *text)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	int out = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int sent;

	strcpy(to.sun_path, TOLD);
	sent = sendto(out, text, strlen(text), 0, (struct sockaddr *)&to, sizeof(to)) > 0;
	close(out);
	return sent;
}

int main(int argc, char **argv)
{
	uint64_t began = __rdtsc(), last, held, compared, moved;
	struct timespec pause = { .tv_nsec = 1000000 };
	const char *count = getenv("LISTEN_FDS");
	char text[512];
	int equal, edu = device(), worked = 0, told = 0;
	size_t size;
	uint64_t *words;

	if (argc != 2 || !count || atoi(count) < 1)
		return 2;
	size = strtoull(argv[1], NULL, 0);
	words = mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, FD, 0);
	if (words == MAP_FAILED)
		return 1;
	last = words[size / 8];
	held = __rdtsc();
	words[size / 8] = held;
	if (edu >= 0)
		worked = works(edu, (char *)words + size);
	moved = __rdtsc();
	equal = filled(words, size);
	compared = __rdtsc();
	snprintf(text, sizeof(text),
		 "{\"name\": \"runs\", \"facts\": {\"last\": %" PRIu64 ", \"began\": %" PRIu64 ", \"held\": %" PRIu64
		 ", \"compared\": %" PRIu64 ", \"equal\": %s, \"pid\": %d, \"names\": \"%s\", \"dma\": %s, \"moved\": %" PRIu64 "}}",
		 last, began, held, compared, equal ? "true" : "false", getpid(), getenv("LISTEN_FDNAMES"),
		 worked ? "true" : "false", moved);
	for (;;) {
		words[size / 8] = __rdtsc();
		told = told || tell(text);
		nanosleep(&pause, NULL);
	}
}
