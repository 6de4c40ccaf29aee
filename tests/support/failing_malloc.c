/* Memory that runs out: preloaded, it lets the n-th allocation after oom_arm(n) fail, and counts them with n = 0. */
#include <errno.h>
#include <stddef.h>
#include <stdatomic.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static atomic_int armed;
static atomic_long count, place;

void oom_arm(long n) {
    atomic_store(&count, 0);
    atomic_store(&place, n);
    atomic_store(&armed, 1);
}

long oom_count(void) { return atomic_load(&count); }

static int fails(void) {
    if (!atomic_load(&armed)) return 0;
    long now = atomic_fetch_add(&count, 1) + 1;
    if (now != atomic_load(&place)) return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void *calloc(size_t number, size_t size) { return fails() ? NULL : __libc_calloc(number, size); }
void *realloc(void *old, size_t size) { return fails() ? NULL : __libc_realloc(old, size); }
void *memalign(size_t alignment, size_t size) { return fails() ? NULL : __libc_memalign(alignment, size); }
void *aligned_alloc(size_t alignment, size_t size) { return fails() ? NULL : __libc_memalign(alignment, size); }

int posix_memalign(void **place_of, size_t alignment, size_t size) {
    if (fails()) return ENOMEM;
    void *found = __libc_memalign(alignment, size);
    if (found == NULL) return ENOMEM;
    *place_of = found;
    return 0;
}
