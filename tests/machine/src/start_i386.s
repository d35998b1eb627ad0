# From multiboot's protected mode to PAE paging and the kernel. The kernel's file lies at RAW_BASE
# as it is on disk, __TEXT at its very start; until paging is on, this copies its segments to where
# they were linked, which is where they stay: virtual is physical.

.set RAW_BASE, 0x4400000
.set LINK_ADDRESS, 0x430000
.set LC_SEGMENT, 1
.set CR4_PAE, 0x20
.set CR0_PG_PE, 0x80000001

.text
.code32
    .space 256                  # postlink.py gives this to the load commands
.globl _mb_header
.p2align 2
_mb_header:                     # filled in by postlink.py
    .long 0x1badb002, 0x00010003, 0, 0, 0, 0, 0, 0
Lgdt:
    .quad 0
    .quad 0x00cf9a000000ffff    # 0x08: code
    .quad 0x00cf92000000ffff    # 0x10: data
Lgdt_pointer:
    .word 23
    .long 0
Lentry:
    cli
    movl $(RAW_BASE + 28), %edx # the first load command
    movl (RAW_BASE + 16), %ebp  # ncmds
Lcommand:
    cmpl $LC_SEGMENT, (%edx)
    jne Lnext
    movl 24(%edx), %edi         # vmaddr
    movl 28(%edx), %ecx         # vmsize
    xorl %eax, %eax
    rep stosb
    movl 24(%edx), %edi
    movl 32(%edx), %esi         # fileoff
    addl $RAW_BASE, %esi
    movl 36(%edx), %ecx         # filesize
    rep movsb
Lnext:
    addl 4(%edx), %edx
    decl %ebp
    jnz Lcommand

    movl $(_kernel_stack + 0x4000), %esp
    call Lhere                  # pc-relative, so still in the raw file
Lhere:
    popl %eax
    movl %eax, %edx
    addl $(Lplaced - Lhere + LINK_ADDRESS - RAW_BASE), %eax
    addl $(Lgdt - Lhere + LINK_ADDRESS - RAW_BASE), %edx
    jmp *%eax
Lplaced:
    pushl %edx                  # LGDT takes a 16-bit limit, then the address
    pushw $23
    lgdt (%esp)
    addl $6, %esp
    ljmp $0x08, $Lreloaded
Lreloaded:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    pushl %ebx                  # struct multiboot_info
    call _boot
    movl %eax, (%esp)           # struct boot_args: the argument of kernel_main
    movl 24(%eax), %ecx         # boot_args.root
    movl $CR4_PAE, %eax
    movl %eax, %cr4
    movl %ecx, %cr3
    movl %cr0, %eax
    orl $CR0_PG_PE, %eax
    movl %eax, %cr0
    xorl %ebp, %ebp
    call _kernel_main
Lhalt:
    cli
    hlt
    jmp Lhalt
