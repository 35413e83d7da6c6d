// What each thread of a kernel has, and the checks of its accesses to memory. The layout is that of `run::thread`.
#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct Thread Thread;
typedef struct {
    void (*fault)(Thread *, uint32_t access, uint64_t address, uint32_t size, uint32_t line);
    int (*race)(Thread *, uint32_t access, uint64_t address, uint32_t size, uint32_t line);
    void (*unknown)(Thread *, const char *what, uint32_t line);
    int (*tick)(Thread *, uint32_t line);
    int (*barrier)(Thread *, uint32_t id, uint32_t count, uint32_t how, uint32_t *value, uint32_t line);
    int (*warp)(Thread *, uint32_t how, uint32_t mask, const uint32_t *in, uint32_t *out, uint32_t line);
    int (*matrix)(Thread *, const uint32_t *form, const uint32_t *a, const uint32_t *b, const uint32_t *c, uint32_t *d, uint32_t line);
    int (*move)(Thread *, const uint32_t *form, uint64_t address, uint32_t stride, uint32_t *values, uint32_t line);
    int (*copy)(Thread *, uint64_t to, uint64_t from, uint32_t size, uint32_t given, uint32_t line);
    int (*copies)(Thread *, uint32_t how, uint32_t left);
    void (*undefined)(Thread *, uint64_t address, uint32_t size, uint32_t line);
    void (*derived)(Thread *, uint32_t what, uint32_t line);
} Runtime;
struct Thread {
    uint32_t tid[3], ntid[3], ctaid[3], nctaid[3], linear, dynamic, launch, spoiled, flags[4];
    uint64_t params, base, span, shared, shared_size;
    uint8_t *shared_state;
    const uint64_t *globals;
    uint64_t *counts;
    const Runtime *run;
    void *block;
};
typedef struct {
    void (*body)(Thread *);
    uint32_t sync;
} Entry;

#define PTX_READ 0
#define PTX_WRITE 1
#define PTX_ATOMIC 2
#define PTX_STRONG 4
#define PTX_GLOBAL 0
#define PTX_SHARED 16
#define PTX_LOCAL 32

// Each byte of memory has a byte of state: 0 allocated, 1 written, up to 0x7f written with a value that is not defined, 0x80 and
// more not to be touched.
static inline int ptx_state_read(const uint8_t *s, uint32_t n) {
    uint64_t v = 0, most = n < 8 ? n : 8;
    for (uint32_t at = 0; at < n; at += 8) {
        memcpy(&v, s + at, most);
#if PTX_STRICT
        if (v != 0x0101010101010101ull >> (64 - 8 * most)) return 0;
#else
        if (v & 0x8080808080808080ull) return 0;
#endif
    }
    return 1;
}
static inline int ptx_state_write(uint8_t *s, uint32_t n) {
    uint64_t v = 0, ones = 0x0101010101010101ull, most = n < 8 ? n : 8;
    for (uint32_t at = 0; at < n; at += 8) {
        memcpy(&v, s + at, most);
        if (v & 0x8080808080808080ull) return 0;
    }
    for (uint32_t at = 0; at < n; at += 8) memcpy(s + at, &ones, most);
    return 1;
}
// Which of up to eight bytes are not defined, a bit for each.
static inline uint32_t ptx_undefined(const uint8_t *s, uint32_t n) {
    uint64_t v = 0;
    memcpy(&v, s, n);
    if (v == 0x0101010101010101ull >> (64 - 8 * n)) return 0;
    uint32_t u = 0;
    for (uint32_t i = 0; i < n; i++) u |= (uint32_t)(s[i] != 1) << i;
    return u;
}
static inline void ptx_spoil(Thread *t, uint8_t *s, uint32_t u, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) if (u >> i & 1) s[i] = t->spoiled;
}
static inline int ptx_state(uint8_t *s, uint32_t n, uint32_t access) {
    if ((access & 3) == PTX_ATOMIC) {
        for (uint32_t i = 0; i < n; i++) if (s[i] != 1 && (PTX_TRACK || s[i] >= 0x80)) return 0;
        return 1;
    }
    if ((access & 3) == PTX_WRITE) return ptx_state_write(s, n);
    return ptx_state_read(s, n);
}
// Whether a thread may access `n` bytes; a write marks them as written.
static inline int ptx_global(Thread *t, uint64_t a, uint32_t n, uint32_t align, uint32_t access) {
    if (a - t->base >= t->span || a & (align - 1)) return 0;
    return ptx_state((uint8_t *)(a + PTX_SHADOW), n, access);
}
static inline int ptx_shared(Thread *t, uint64_t a, uint32_t n, uint32_t align, uint32_t access) {
    uint64_t at = a - t->shared;
    if (at >= t->shared_size || n > t->shared_size - at || a & (align - 1)) return 0;
    return ptx_state(t->shared_state + at, n, access);
}
static inline int ptx_local(uint64_t from, uint64_t size, uint64_t a, uint32_t n, uint32_t align) {
    uint64_t at = a - from;
    return at < size && n <= size - at && !(a & (align - 1));
}

#define PTX_STATE_GLOBAL(a) ((uint8_t *)((a) + PTX_SHADOW))
#define PTX_STATE_SHARED(a) (t->shared_state + ((a) - t->shared))
#define PTX_STATE_LOCAL(a) (locals_state + ((a) - (uint64_t)locals))
#define PTX_STATE_GENERIC(a) \
    ((a) - t->shared < (1u << 20) ? PTX_STATE_SHARED(a) : (a) - (uint64_t)locals < sizeof locals ? PTX_STATE_LOCAL(a) : PTX_STATE_GLOBAL(a))
// What decides where a program goes or what it touches must be defined.
#define PTX_DERIVED(u, what, line) if (__builtin_expect((u) != 0, 0)) { t->run->derived(t, what, line); goto done; }
#if PTX_DISTINCT
// Sectors that this launch has not touched before.
static inline void ptx_touch(Thread *t, uint64_t a, uint32_t n, uint32_t access) {
    for (uint64_t s = (a - PTX_BASE) / 32; s <= (a + n - 1 - PTX_BASE) / 32; s++) {
        uint32_t *last = (uint32_t *)(PTX_TOUCHED + 8 * s);
        if ((access & 3) != PTX_WRITE && last[0] != t->launch) { last[0] = t->launch; t->counts[PTX_DISTINCT] += 32; }
        if ((access & 3) != PTX_READ && last[1] != t->launch) { last[1] = t->launch; t->counts[PTX_DISTINCT + 1] += 32; }
    }
}
#define PTX_TOUCH(a, n, access) ptx_touch(t, a, n, access);
#else
#define PTX_TOUCH(a, n, access)
#endif
#if PTX_RACES
#define PTX_RACE(space, a, n, access, line) if (!t->run->race(t, (space) | (access), a, n, line)) goto done;
#else
#define PTX_RACE(space, a, n, access, line)
#endif
#define PTX_FAULT(space, a, n, access, line) { t->run->fault(t, (space) | (access), a, n, line); goto done; }
#define PTX_CHECK_GLOBAL(a, n, align, access, line) \
    if (__builtin_expect(!ptx_global(t, a, n, align, access), 0)) PTX_FAULT(PTX_GLOBAL, a, n, access, line) \
    PTX_TOUCH(a, n, access) \
    PTX_RACE(PTX_GLOBAL, a, n, access, line)
#define PTX_CHECK_SHARED(a, n, align, access, line) \
    if (__builtin_expect(!ptx_shared(t, a, n, align, access), 0)) PTX_FAULT(PTX_SHARED, a, n, access, line) \
    PTX_RACE(PTX_SHARED, a, n, access, line)
#define PTX_CHECK_LOCAL(a, n, align, access, line) \
    if (__builtin_expect(!ptx_local((uint64_t)locals, sizeof locals, a, n, align), 0)) PTX_FAULT(PTX_LOCAL, a, n, access, line) \
    if ((access) & 3) memset(PTX_STATE_LOCAL(a), 1, n);
// The address decides where it is.
#define PTX_CHECK_GENERIC(a, n, align, access, line) \
    if (a - t->shared < (1u << 20)) { PTX_CHECK_SHARED(a, n, align, access, line) } \
    else if (a - (uint64_t)locals < sizeof locals) { PTX_CHECK_LOCAL(a, n, align, access, line) } \
    else { PTX_CHECK_GLOBAL(a, n, align, access, line) }
// At each branch backward, so that a loop without end is found.
#define PTX_TICK(line) if (!(++spins & 0xfffff) && !t->run->tick(t, line)) goto done;
