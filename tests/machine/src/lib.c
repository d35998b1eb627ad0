/* What a C compiler expects to be there, and little else. */
#include "machine.h"

void *memcpy(void *to, const void *from, uptr size) {
    u8 *out = to;
    const u8 *in = from;
    while (size--)
        *out++ = *in++;
    return to;
}

void *memset(void *to, int value, uptr size) {
    u8 *out = to;
    while (size--)
        *out++ = (u8)value;
    return to;
}

uptr strlen(const char *text) {
    uptr n = 0;
    while (text[n])
        n++;
    return n;
}

int strcmp(const char *a, const char *b) {
    while (*a && *a == *b)
        a++, b++;
    return (u8)*a - (u8)*b;
}

/* What fits into char[room], the NUL included; the rest of `to` is left as it is. */
void copy_text(char *to, const char *from, uptr room) {
    uptr size = strlen(from);
    memcpy(to, from, size < room ? size : room - 1);
}

u32 crc32(const void *data, uptr size) {
    const u8 *in = data;
    u32 crc = ~0u;
    while (size--) {
        crc ^= *in++;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}
