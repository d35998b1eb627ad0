# From multiboot's 32-bit protected mode to long mode, to boot() in the raw file, to the kernel.
# Everything here is one atom, so that differences of its labels are known to the assembler.
# The kernel's file lies at RAW_BASE as it is on disk; __TEXT, where this is, at its very start.

.set RAW_BASE, 0x4400000
.set BOOT_STACK, 0x90000
.set TABLES, 0x70000            # three pages, wiped by the kernel
.set MSR_EFER, 0xc0000080
.set EFER_LME_NXE, 0x900
.set CR4_PAE, 0x20
.set CR0_PG_PE, 0x80000001
.set STATIC_BASE, 0xffffff8000000000
.set LINK_ADDRESS, 0xffffff8000200000

.text
.code32
    .space 256                  # postlink.py gives this to the load commands
.globl _mb_header
.p2align 2
_mb_header:                     # filled in by postlink.py
    .long 0x1badb002, 0x00010003, 0, 0, 0, 0, 0, 0
Lgdt:
    .quad 0
    .quad 0x00af9a000000ffff    # 0x08: 64-bit code
    .quad 0x00cf92000000ffff    # 0x10: data
Lgdt_pointer:
    .word 23
    .long 0
Lentry:                         # 0x3e from the header: postlink.py looks for the jump below
    cli
    movl $BOOT_STACK, %esp
    call Lhere
Lhere:
    popl %ebp                   # where we run
    movl %ebx, %esi             # struct multiboot_info

    xorl %eax, %eax             # one GiB one to one, in 2 MiB pages
    movl $TABLES, %edi
    movl $0xc00, %ecx
    rep stosl
    movl $(TABLES + 0x1003), TABLES
    movl $(TABLES + 0x2003), TABLES + 0x1000
    movl $(TABLES + 0x2000), %edi
    movl $0x83, %eax
    movl $512, %ecx
Lfill:
    movl %eax, (%edi)
    addl $8, %edi
    addl $0x200000, %eax
    loop Lfill

    movl $TABLES, %eax
    movl %eax, %cr3
    movl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $MSR_EFER, %ecx
    rdmsr
    orl $EFER_LME_NXE, %eax
    wrmsr
    movl %cr0, %eax
    orl $CR0_PG_PE, %eax
    movl %eax, %cr0

    leal (Lgdt - Lhere)(%ebp), %eax
    movl %eax, (Lgdt_pointer + 2 - Lhere)(%ebp)
    lgdt (Lgdt_pointer - Lhere)(%ebp)
    pushl $0x08
    leal (Llong - Lhere)(%ebp), %eax
    pushl %eax
    lret

.code64
Llong:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl $BOOT_STACK, %esp      # clears the upper half too
    movl %esi, %edi
    xorl %ebp, %ebp
    call _boot
    movq %rax, %rdi             # struct boot_args, by its physical address
    leaq Lkernel(%rip), %rdx    # this very place ...
    movabsq $(LINK_ADDRESS - RAW_BASE), %rcx
    addq %rcx, %rdx
    addq (%rdi), %rdx           # ... where the kernel has it: boot_args.slide comes first
    movq 48(%rdi), %rax         # boot_args.root
    movabsq $STATIC_BASE, %rcx
    addq %rcx, %rdi
    movq %rax, %cr3
    jmpq *%rdx
Lkernel:
    leaq (_kernel_stack + 0x4000)(%rip), %rsp
    xorl %ebp, %ebp
    call _kernel_main
Lhalt:
    cli
    hlt
    jmp Lhalt
