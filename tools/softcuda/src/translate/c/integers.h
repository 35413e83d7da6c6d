// Integers: division by zero, shifts by more than the width, fields of bits.
#define PTX_INT(ty, c) \
    static inline c ptx_div_##ty(c a, c b) { return b ? (c)(a / b) : (c)-1; } \
    static inline c ptx_rem_##ty(c a, c b) { return b ? (c)(a % b) : a; }
PTX_INT(u16, uint16_t) PTX_INT(u32, uint32_t) PTX_INT(u64, uint64_t) PTX_INT(s16, int16_t)
static inline int32_t ptx_div_s32(int32_t a, int32_t b) { return b ? (int32_t)((int64_t)a / b) : -1; }
static inline int32_t ptx_rem_s32(int32_t a, int32_t b) { return b ? (int32_t)((int64_t)a % b) : a; }
static inline int64_t ptx_div_s64(int64_t a, int64_t b) { return !b ? -1 : b == -1 ? (int64_t)(0 - (uint64_t)a) : a / b; }
static inline int64_t ptx_rem_s64(int64_t a, int64_t b) { return !b ? a : b == -1 ? 0 : a % b; }

static inline uint64_t ptx_shl(uint64_t a, uint32_t n, uint32_t w) { return n >= w ? 0 : a << n; }
static inline uint64_t ptx_shr(uint64_t a, uint32_t n, uint32_t w) { return n >= w ? 0 : a >> n; }
static inline int64_t ptx_sar(int64_t a, uint32_t n, uint32_t w) { return a >> (n >= w ? w - 1 : n); }
static inline uint32_t ptx_shf_l(uint32_t a, uint32_t b, uint32_t n, int wrap) { n = wrap ? n & 31 : n > 32 ? 32 : n; return n == 32 ? a : (((uint64_t)b << 32 | a) << n) >> 32; }
static inline uint32_t ptx_shf_r(uint32_t a, uint32_t b, uint32_t n, int wrap) { n = wrap ? n & 31 : n > 32 ? 32 : n; return ((uint64_t)b << 32 | a) >> n; }
static inline uint64_t ptx_mask(uint32_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
static inline uint32_t ptx_bfe_u32(uint32_t a, uint32_t at, uint32_t n) { at &= 255; n &= 255; return at > 31 ? 0 : (a >> at) & ptx_mask(n); }
static inline uint64_t ptx_bfe_u64(uint64_t a, uint32_t at, uint32_t n) { at &= 255; n &= 255; return at > 63 ? 0 : (a >> at) & ptx_mask(n); }
static inline int64_t ptx_bfe_signed(int64_t a, uint32_t at, uint32_t n, uint32_t w) {
    at &= 255; n &= 255;
    if (!n) return 0;
    uint32_t top = at + n > w ? w - 1 : at + n - 1;
    uint64_t sign = a >> top & 1 ? ~0ull : 0, out = 0;
    for (uint32_t i = 0; i < w; i++) out |= (i < n && at + i < w ? (uint64_t)a >> (at + i) & 1 : sign & 1) << i;
    return out;
}
static inline int32_t ptx_bfe_s32(int32_t a, uint32_t at, uint32_t n) { return ptx_bfe_signed(a, at, n, 32); }
static inline int64_t ptx_bfe_s64(int64_t a, uint32_t at, uint32_t n) { return ptx_bfe_signed(a, at, n, 64); }
static inline uint64_t ptx_bfi(uint64_t a, uint64_t b, uint32_t at, uint32_t n, uint32_t w) {
    at &= 255; n &= 255;
    if (at >= w) return b;
    uint64_t m = ptx_mask(n) << at;
    return (b & ~m) | (a << at & m);
}
static inline uint32_t ptx_prmt(uint32_t a, uint32_t b, uint32_t c) {
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t s = c >> 4 * i & 15, v = both >> 8 * (s & 7) & 255;
        if (s & 8) v = v & 128 ? 255 : 0;
        out |= v << 8 * i;
    }
    return out;
}
static inline uint32_t ptx_clz(uint64_t a, uint32_t w) { return a ? __builtin_clzll(a) - (64 - w) : w; }
static inline uint32_t ptx_bfind(uint64_t a, int left, uint32_t w) { return !a ? ~0u : left ? ptx_clz(a, w) : 63 - __builtin_clzll(a); }
static inline uint64_t ptx_brev(uint64_t a, uint32_t w) { uint64_t out = 0; for (uint32_t i = 0; i < w; i++) out |= (a >> i & 1) << (w - 1 - i); return out; }
static inline uint32_t ptx_lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t out = 0;
    for (int i = 0; i < 8; i++) if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return out;
}
static inline uint32_t ptx_dp4a(uint32_t a, uint32_t b, uint32_t c, int sa, int sb) {
    for (int i = 0; i < 4; i++) {
        int32_t x = sa ? (int8_t)(a >> 8 * i) : (uint8_t)(a >> 8 * i), y = sb ? (int8_t)(b >> 8 * i) : (uint8_t)(b >> 8 * i);
        c += (uint32_t)(x * y);
    }
    return c;
}
