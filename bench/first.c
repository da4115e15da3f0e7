/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The least that a live update can be, for bench.initrd: a static program that is the first process of the next kernel, in the
 * same initrd, and has nothing to do but to retrieve one memfd and to write to it.
 *
 *   first update KERNEL INITRD BYTES PATH   a memfd of its own; preserve it, load both with rdinit=PATH, write the time, jump
 *   first                                   as process 1: retrieve it, write to it, and tell on the console
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

enum { PAGE = 4096, COMMAND_LINE = 2048 };

/* include/uapi/linux/liveupdate.h, which headers of distributions do not have yet. */
#define CREATE_SESSION 0xba00
#define RETRIEVE_SESSION 0xba01
#define PRESERVE_FD 0xba40
#define RETRIEVE_FD 0xba41

struct named {
	uint32_t size;
	int32_t fd;
	char name[64];
};

struct file {
	uint32_t size;
	int32_t fd;
	uint64_t token;
};

static int must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static int session(unsigned long request)
{
	struct named argument = { .size = sizeof(argument), .name = "bench.first" };
	int device = must(open("/dev/liveupdate", O_RDWR | O_CLOEXEC), "/dev/liveupdate");

	must(ioctl(device, request, &argument), "session");
	close(device);
	return argument.fd;
}

static uint64_t *mapped(int fd, size_t size)
{
	void *words = mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	must(words == MAP_FAILED ? -1 : 0, "mmap");
	return words;
}

static void update(const char *kernel, const char *initrd, size_t size, const char *path)
{
	int fd = must(memfd_create("first", MFD_CLOEXEC), "memfd_create");
	struct file argument = { .size = sizeof(argument), .fd = fd };
	int image = must(open(kernel, O_RDONLY | O_CLOEXEC), kernel);
	int files = must(open(initrd, O_RDONLY | O_CLOEXEC), initrd);
	int line_fd = must(open("/proc/cmdline", O_RDONLY | O_CLOEXEC), "/proc/cmdline");
	char line[COMMAND_LINE];
	ssize_t length;
	uint64_t *words;

	must(ftruncate(fd, (off_t)size + PAGE), "ftruncate");
	words = mapped(fd, size);
	for (size_t at = 0; at < size; at += PAGE)
		words[at / 8] = at;
	must(ioctl(session(CREATE_SESSION), PRESERVE_FD, &argument), "PRESERVE_FD");
	length = must((int)read(line_fd, line, sizeof(line) - 100), "/proc/cmdline");
	length += sprintf(line + length - 1, " rdinit=%s", path); /* over the newline */
	must((int)syscall(SYS_kexec_file_load, image, files, (unsigned long)length, line, 0UL), "kexec_file_load");
	sync();
	words[size / 8] = __rdtsc();
	must((int)syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL), "reboot");
}

static void restore(uint64_t began)
{
	struct file argument = { .size = sizeof(argument), .fd = -1 };
	uint64_t last, held;
	uint64_t *words;
	struct stat found;

	must(mount("devtmpfs", "/dev", "devtmpfs", 0, NULL), "/dev");
	must(ioctl(session(RETRIEVE_SESSION), RETRIEVE_FD, &argument), "RETRIEVE_FD");
	must(fstat(argument.fd, &found), "fstat");
	words = mapped(argument.fd, (size_t)found.st_size - PAGE);
	last = words[found.st_size / 8 - PAGE / 8];
	held = __rdtsc();
	words[found.st_size / 8 - PAGE / 8] = held;
	printf("first: %llu %llu %llu\n", (unsigned long long)last, (unsigned long long)began, (unsigned long long)held);
	fflush(stdout);
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	uint64_t began = __rdtsc();

	if (getpid() == 1)
		restore(began);
	if (argc != 6 || strcmp(argv[1], "update"))
		return 2;
	update(argv[2], argv[3], strtoull(argv[4], NULL, 0), argv[5]);
	return 0;
}
