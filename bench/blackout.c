/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A live update of one memfd with nothing around it: what khod's blackout is measured against. The next kernel's half also
 * plays the program that waits for its memory, alone or as khod's client, so that both sides compare the same words by the
 * same code.
 *
 *   blackout fill FD             mark the words of a file of BYTES
 *   blackout update KERNEL       a file of its own, marked; preserve it, load KERNEL, write the last word, jump
 *   blackout retrieve OUT        in the next kernel: take it from the kernel, compare it
 *   blackout claim OUT SOCKET    in the next kernel: wait for khod, claim the instance "guest", compare it
 *
 * The last two write into OUT: the time stamp counter at the last write, at main(), when the descriptor was there, and when
 * the words were compared.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum {
	BYTES = 64 << 20,
	WORDS = BYTES / 8,
	TOKEN = 0,
	COMMAND_LINE = 2048,
};

/* include/uapi/linux/liveupdate.h, which headers of distributions do not have yet. */
#define SESSION_NAME 64
#define CREATE_SESSION 0xba00
#define RETRIEVE_SESSION 0xba01
#define PRESERVE_FD 0xba40
#define RETRIEVE_FD 0xba41

struct named {
	uint32_t size;
	int32_t fd;
	char name[SESSION_NAME];
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

static uint64_t *mapped(int fd)
{
	void *words = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	must(words == MAP_FAILED ? -1 : 0, "mmap");
	return words;
}

/* Every word says where it belongs; the first is for the stamp. */
static uint64_t mark(uint64_t index)
{
	return index * UINT64_C(0x9e3779b97f4a7c15);
}

static uint64_t *filled(int fd)
{
	uint64_t *words = mapped(fd);

	for (uint64_t i = 1; i < WORDS; i++)
		words[i] = mark(i);
	return words;
}

static void compare_and_tell(int fd, uint64_t began, const char *out)
{
	uint64_t held = __rdtsc();
	const uint64_t *words = mapped(fd);
	FILE *file;

	for (uint64_t i = 1; i < WORDS; i++)
		if (words[i] != mark(i)) {
			fprintf(stderr, "word %llu is %llx\n", (unsigned long long)i, (unsigned long long)words[i]);
			exit(1);
		}
	uint64_t compared = __rdtsc();

	file = fopen(out, "w");
	must(file ? 0 : -1, out);
	fprintf(file, "%llu %llu %llu %llu\n", (unsigned long long)words[0], (unsigned long long)began,
		(unsigned long long)held, (unsigned long long)compared);
	must(fclose(file), out);
}

static int session(unsigned long request)
{
	struct named argument = { .size = sizeof(argument), .name = "bench.blackout" };
	int device = must(open("/dev/liveupdate", O_RDWR | O_CLOEXEC), "/dev/liveupdate");

	must(ioctl(device, request, &argument), "session");
	close(device);
	return argument.fd;
}

static void update(const char *kernel)
{
	int fd = must(memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING), "memfd_create");
	struct file argument = { .size = sizeof(argument), .token = TOKEN, .fd = fd };
	int image = must(open(kernel, O_RDONLY | O_CLOEXEC), kernel);
	int line_fd = must(open("/proc/cmdline", O_RDONLY | O_CLOEXEC), "/proc/cmdline");
	char line[COMMAND_LINE];
	ssize_t length;
	uint64_t *words;

	must(ftruncate(fd, BYTES), "ftruncate");
	words = filled(fd);
	must(ioctl(session(CREATE_SESSION), PRESERVE_FD, &argument), "PRESERVE_FD");
	length = must((int)read(line_fd, line, sizeof(line)), "/proc/cmdline");
	line[length - 1] = '\0'; /* it ends in a newline */
	must((int)syscall(SYS_kexec_file_load, image, -1, (unsigned long)length, line, (unsigned long)KEXEC_FILE_NO_INITRAMFS),
	     "kexec_file_load");
	words[0] = __rdtsc();
	must((int)syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL), "reboot");
}

static int retrieved(void)
{
	struct file argument = { .size = sizeof(argument), .token = TOKEN, .fd = -1 };

	must(ioctl(session(RETRIEVE_SESSION), RETRIEVE_FD, &argument), "RETRIEVE_FD");
	return argument.fd;
}

/* A connection to khod, asked for every 5 ms until it listens. */
static int connected(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = must(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");

	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	while (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		if (errno != ENOENT && errno != ECONNREFUSED)
			must(-1, path);
		nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
	}
	return fd;
}

/* One varlink call: JSON up to a NUL each way, the descriptor beside the answer. */
static int claimed(const char *path)
{
	static const char call[] = "{\"method\": \"org.khod.Host.Claim\", \"parameters\": {\"name\": \"guest\", \"unverified\": false}}";
	int fd = connected(path), found = -1;
	char answer[65536] = "", control[CMSG_SPACE(sizeof(int))];
	size_t length = 0;

	must((int)send(fd, call, sizeof(call), 0), "send");
	while (length + 1 < sizeof(answer) && (!length || answer[length - 1])) {
		struct iovec part = { answer + length, sizeof(answer) - 1 - length };
		struct msghdr message = {
			.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control),
		};
		struct cmsghdr *rights;
		int size = must((int)recvmsg(fd, &message, MSG_CMSG_CLOEXEC), "recvmsg");

		rights = CMSG_FIRSTHDR(&message);
		if (rights && rights->cmsg_type == SCM_RIGHTS)
			memcpy(&found, CMSG_DATA(rights), sizeof(found));
		if (!size)
			break;
		length += (size_t)size;
	}
	if (found < 0) {
		fprintf(stderr, "khod answered %s\n", answer);
		exit(1);
	}
	return found;
}

int main(int argc, char **argv)
{
	uint64_t began = __rdtsc();
	const char *verb = argc > 2 ? argv[1] : "";

	if (!strcmp(verb, "fill"))
		filled(atoi(argv[2]));
	else if (!strcmp(verb, "update"))
		update(argv[2]);
	else if (!strcmp(verb, "retrieve"))
		compare_and_tell(retrieved(), began, argv[2]);
	else if (!strcmp(verb, "claim") && argc > 3)
		compare_and_tell(claimed(argv[3]), began, argv[2]);
	else
		return 2;
	return 0;
}
