/*
 * Stands before the C library, and answers some calls as network and other filesystems do.
 *
 * The variable SHIM names the calls and their error numbers: flockN, dirsyncN (fsync of a folder), fdatasyncN, fallocN.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>

/* Whether a call is to fail; sets errno to the number that follows its name. */
static int fails(const char *call)
{
    const char *place = getenv("SHIM") ? strstr(getenv("SHIM"), call) : NULL;

    return place && sscanf(place + strlen(call), "%d", &errno) == 1;
}

static int is_folder(int descriptor)
{
    struct stat found;

    return fstat(descriptor, &found) == 0 && S_ISDIR(found.st_mode);
}

int flock(int descriptor, int operation)
{
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");

    return fails("flock") ? -1 : real(descriptor, operation);
}

int fsync(int descriptor)
{
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");

    return is_folder(descriptor) && fails("dirsync") ? -1 : real(descriptor);
}

int fdatasync(int descriptor)
{
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");

    return fails("fdatasync") ? -1 : real(descriptor);
}

int fallocate(int descriptor, int mode, off_t offset, off_t length)
{
    int (*real)(int, int, off_t, off_t) = dlsym(RTLD_NEXT, "fallocate");

    return fails("falloc") ? -1 : real(descriptor, mode, offset, length);
}

int fallocate64(int descriptor, int mode, off_t offset, off_t length)
{
    return fallocate(descriptor, mode, offset, length);
}
