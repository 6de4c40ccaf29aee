/* The part of NVIDIA's libcuda that topt_deploy/tensorrt/cuda_driver.py calls, with this process's memory as the GPU's, for machines
   without one. Environment: FAKE_CUDA_INIT, what cuInit returns; FAKE_CUDA_GPUS, how many there are; FAKE_CUDA_BYTES,
   how much may be allocated. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t used, blocks;
static void *current;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}
static int context(void) { return current ? 0 : 201; }

int cuInit(unsigned flags) { return flags ? 1 : (int)setting("FAKE_CUDA_INIT", 0); }
int cuDeviceGetCount(int *count) { *count = (int)setting("FAKE_CUDA_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "NVIDIA Make-believe %d", device); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : -1;
    return 0;
}
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = (size_t)24 << 30; return 0; }
int cuGetErrorName(int code, const char **name) {
    *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_SOME_KIND";
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context_, int device) { static int primary; (void)device; *context_ = &primary; return 0; }
int cuCtxSetCurrent(void *context_) { current = context_; return 0; }
int cuStreamCreate(void **stream, unsigned flags) { static int one; (void)flags; *stream = &one; return context(); }
int cuStreamSynchronize(void *stream) { return stream ? context() : 1; }
int cuDeviceGetDefaultMemPool(void **pool, int device) { static int one; (void)device; *pool = &one; return 0; }
int cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
    return pool && attribute == 4 && *(uint64_t *)value == UINT64_MAX ? 0 : 1;
}
int cuMemAllocAsync(uint64_t *address, size_t size, void *stream) {
    if (!size || !stream) return 1;
    if (context()) return 201;
    if (used + size > (size_t)setting("FAKE_CUDA_BYTES", 1l << 40)) return 2;
    size_t *block = malloc(size + 16);
    *block = size;
    used += size;
    blocks++;
    memset(block + 2, 0xee, size); /* what is never written is not mistaken for zeros */
    *address = (uint64_t)(uintptr_t)(block + 2);
    return 0;
}
int cuMemFreeAsync(uint64_t address, void *stream) {
    size_t *block = (size_t *)(uintptr_t)address - 2;
    used -= *block;
    blocks--;
    free(block);
    return stream ? 0 : 1;
}
static int copy(uint64_t target, uint64_t source, size_t size, void *stream) {
    memmove((void *)(uintptr_t)target, (void *)(uintptr_t)source, size);
    return stream ? context() : 1;
}
int cuMemcpyHtoDAsync_v2(uint64_t target, uint64_t source, size_t size, void *stream) { return copy(target, source, size, stream); }
int cuMemcpyDtoHAsync_v2(uint64_t target, uint64_t source, size_t size, void *stream) { return copy(target, source, size, stream); }
int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t size, void *stream) { return copy(target, source, size, stream); }
size_t fake_blocks(void) { return blocks; }
