// Atomic operations, which blocks on other threads of the host see as well.
#define PTX_LOOP(ty, c, name, next) \
    static inline c ptx_atom_##name##_##ty(uint64_t p, c v) { \
        c o = *(volatile c *)p, n; \
        do n = next; while (!__atomic_compare_exchange_n((c *)p, &o, n, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)); \
        return o; \
    }
#define PTX_ATOM(ty, c) \
    static inline c ptx_atom_add_##ty(uint64_t p, c v) { return __atomic_fetch_add((c *)p, v, __ATOMIC_SEQ_CST); } \
    static inline c ptx_atom_and_##ty(uint64_t p, c v) { return __atomic_fetch_and((c *)p, v, __ATOMIC_SEQ_CST); } \
    static inline c ptx_atom_or_##ty(uint64_t p, c v) { return __atomic_fetch_or((c *)p, v, __ATOMIC_SEQ_CST); } \
    static inline c ptx_atom_xor_##ty(uint64_t p, c v) { return __atomic_fetch_xor((c *)p, v, __ATOMIC_SEQ_CST); } \
    static inline c ptx_atom_exch_##ty(uint64_t p, c v) { return __atomic_exchange_n((c *)p, v, __ATOMIC_SEQ_CST); } \
    static inline c ptx_atom_cas_##ty(uint64_t p, c e, c v) { __atomic_compare_exchange_n((c *)p, &e, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); return e; } \
    PTX_LOOP(ty, c, min, v < o ? v : o) PTX_LOOP(ty, c, max, v > o ? v : o) \
    PTX_LOOP(ty, c, inc, o >= v ? 0 : o + 1) PTX_LOOP(ty, c, dec, o == 0 || o > v ? v : o - 1)
PTX_ATOM(u16, uint16_t) PTX_ATOM(u32, uint32_t) PTX_ATOM(s32, int32_t) PTX_ATOM(u64, uint64_t) PTX_ATOM(s64, int64_t)
#define PTX_BITS(name, c, next) \
    static inline c ptx_bits_##name(uint64_t p, c v) { \
        c o = *(volatile c *)p, n; \
        do n = next; while (!__atomic_compare_exchange_n((c *)p, &o, n, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)); \
        return o; \
    }
PTX_BITS(add_f32, uint32_t, ptx_bits32(ptx_f32(o) + ptx_f32(v)))
PTX_BITS(add_f64, uint64_t, ptx_bits64(ptx_f64(o) + ptx_f64(v)))
#define PTX_HALVES(ty) \
    PTX_BITS(add_##ty, uint16_t, ptx_to_##ty(ptx_##ty(o) + ptx_##ty(v))) \
    PTX_BITS(min_##ty, uint16_t, ptx_to_##ty(ptx_min(ptx_##ty(o), ptx_##ty(v)))) \
    PTX_BITS(max_##ty, uint16_t, ptx_to_##ty(ptx_max(ptx_##ty(o), ptx_##ty(v)))) \
    static inline uint32_t ptx_bits_add_##ty##x2(uint64_t p, uint32_t v) { return ptx_bits_add_##ty(p, v) | (uint32_t)ptx_bits_add_##ty(p + 2, v >> 16) << 16; } \
    static inline uint32_t ptx_bits_min_##ty##x2(uint64_t p, uint32_t v) { return ptx_bits_min_##ty(p, v) | (uint32_t)ptx_bits_min_##ty(p + 2, v >> 16) << 16; } \
    static inline uint32_t ptx_bits_max_##ty##x2(uint64_t p, uint32_t v) { return ptx_bits_max_##ty(p, v) | (uint32_t)ptx_bits_max_##ty(p + 2, v >> 16) << 16; }
PTX_HALVES(f16) PTX_HALVES(bf16)
