/* The first serial port, on which the machine says what it is. */
#include "machine.h"

#define COM1 0x3f8
#define LINE_STATUS (COM1 + 5)
#define TRANSMITTER_EMPTY 0x20

static u8 in8(u16 port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void out8(u16 port, u8 value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void put(char c) {
    while (!(in8(LINE_STATUS) & TRANSMITTER_EMPTY))
        ;
    out8(COM1, (u8)c);
}

static void put_text(const char *text) {
    while (*text)
        put(*text++);
}

static void put_hex(u64 value, int digits) {
    int shift = 60;
    while (shift > 4 * (digits - 1) && !(value >> shift & 15))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

/* 64-bit division would need a library on i386; every number here fits into 32 bits. */
static void put_decimal(u32 value) {
    char digits[10];
    int n = 0;
    do
        digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n)
        put(digits[--n]);
}

/* %s text, %d int, %u unsigned, %p an address as "0x..." with its quotes, %b a byte in hex. */
void print(const char *format, ...) {
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            put_text(__builtin_va_arg(arguments, const char *));
            break;
        case 'd': {
            int value = __builtin_va_arg(arguments, int);
            if (value < 0)
                put('-');
            put_decimal(value < 0 ? -(u32)value : (u32)value);
            break;
        }
        case 'u':
            put_decimal(__builtin_va_arg(arguments, u32));
            break;
        case 'b':
            put_hex(__builtin_va_arg(arguments, u32), 2);
            break;
        case 'p':
            put_text("\"0x");
            put_hex(__builtin_va_arg(arguments, uptr), 1);
            put('"');
            break;
        default:
            put('%');
        }
    }
    __builtin_va_end(arguments);
}
