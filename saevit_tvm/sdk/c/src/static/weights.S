/* The weights as constant data: where .rodata goes, they go, into flash too. */
#if defined(__riscv) || defined(__aarch64__) || defined(__x86_64__)
    .section .rodata.saevit_weights, "a"
    .balign 64
    .globl saevit_weights
    .hidden saevit_weights
    .type saevit_weights, @object
saevit_weights:
    .incbin WEIGHTS
    .size saevit_weights, . - saevit_weights
    .section .note.GNU-stack, "", @progbits
#else
#error "only x86-64, arm64 and riscv64 are supported"
#endif
