/* A plugin of qemu that counts what an aarch64 program executes: instructions by class, bytes moved, float operations.
 *
 * Every translated block is judged once, from the bits of its instructions; running it adds one to its counter. At
 * exit the products are summed and written as JSON to the file given as out=FILE. An atomic operation counts as a load
 * that also stores. Bytes that SVE moves depend on its vectors' length and are left out; `sve` says how many such
 * instructions there were.
 *
 * Distributions package no header for plugins: the few functions that are needed are declared here, as version 1 of
 * the interface has them (qemu 5.2 to 8.2).
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct {
  const char* target_name;
} info_t; /* the beginning of qemu_info_t */
struct qemu_plugin_tb;
struct qemu_plugin_insn;
EXPORT int qemu_plugin_version = 1;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t index);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn* insn);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*callback)(uint64_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb* tb, void (*callback)(unsigned, void*), int flags,
                                          void* data);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*callback)(uint64_t, void*), void* data);

enum { FMA, VECTOR, SCALAR, LOAD, STORE, BRANCH, SVE, LOADED, STORED, FLOAT_OPS, FIELDS };
static const char* const NAMES[FIELDS] = {"fma",    "vector", "scalar",       "load",         "store",
                                          "branch", "sve",    "bytes_loaded", "bytes_stored", "float_ops"};

typedef struct block {
  uint64_t runs;
  uint32_t count[FIELDS];
  struct block* next;
} block;

static block* blocks;
static char* output;

static uint32_t field(uint32_t word, int high, int low) { return word >> low & ((2u << (high - low)) - 1); }

/* Loads and stores -------------------------------------------------------------- */

static void moved(block* b, int is_load, uint32_t bytes) {
  b->count[is_load ? LOAD : STORE]++;
  b->count[is_load ? LOADED : STORED] += bytes;
}

static void structures(block* b, uint32_t word) {
  static const uint32_t REGISTERS[16] = {[0] = 4, [2] = 4, [4] = 3, [6] = 3, [7] = 1, [8] = 2, [10] = 2};
  if (!field(word, 24, 24)) {
    moved(b, field(word, 22, 22), REGISTERS[field(word, 15, 12)] * (field(word, 30, 30) ? 16 : 8));
    return;
  }
  uint32_t opcode = field(word, 15, 13), size = field(word, 11, 10);
  uint32_t count = ((opcode & 1) << 1 | field(word, 21, 21)) + 1;
  uint32_t each = opcode >> 1 == 3 ? 1u << size : opcode >> 1 == 2 ? (size & 1 ? 8 : 4) : 1u << (opcode >> 1);
  moved(b, field(word, 22, 22), count * each);
}

static void one_register(block* b, uint32_t word) {
  uint32_t size = field(word, 31, 30), is_vector = field(word, 26, 26), opcode = field(word, 23, 22);
  if (!is_vector && !field(word, 24, 24) && field(word, 21, 21) && !field(word, 11, 10)) { /* atomic */
    moved(b, 1, 1u << size);
    b->count[STORED] += 1u << size;
  } else if (is_vector) {
    moved(b, opcode & 1, opcode & 2 ? 16 : 1u << size);
  } else if (size == 3 && opcode == 2) {
    b->count[SCALAR]++; /* a prefetch */
  } else {
    moved(b, opcode != 0, 1u << size);
  }
}

static void load_or_store(block* b, uint32_t word) {
  uint32_t size = field(word, 31, 30), is_vector = field(word, 26, 26);
  switch (field(word, 29, 27)) {
    case 1: /* exclusive, ordered; structures of vectors */
      if (is_vector)
        structures(b, word);
      else
        moved(b, field(word, 22, 22), (1u << size) << (field(word, 21, 21) && !field(word, 23, 23)));
      break;
    case 3: /* beside the program counter */
      if (!is_vector && size == 3)
        b->count[SCALAR]++;
      else
        moved(b, 1, is_vector ? 4u << size : size == 1 ? 8 : 4);
      break;
    case 5: /* pairs */
      moved(b, field(word, 22, 22), 2 * (is_vector ? 4u << size : size & 2 ? 8 : 4));
      break;
    default:
      one_register(b, word);
  }
}

/* Arithmetic --------------------------------------------------------------------- */

static void arithmetic(block* b, int is_fma, uint32_t operations) {
  b->count[is_fma ? FMA : VECTOR]++;
  b->count[FLOAT_OPS] += operations << is_fma;
}

static void scalar_float(block* b, uint32_t word) {
  uint32_t opcode = field(word, 15, 12);
  int two_sources = field(word, 21, 21) && field(word, 11, 10) == 2;
  int root = field(word, 21, 21) && field(word, 14, 10) == 16 && field(word, 20, 15) == 3;
  if (field(word, 24, 24))
    arithmetic(b, 1, 1);
  else
    arithmetic(b, 0, (two_sources && opcode <= 8) || root);
}

static void vector_float(block* b, uint32_t word) {
  uint32_t half_lanes = field(word, 30, 30) ? 8 : 4, size = field(word, 23, 22), unsigned_bit = field(word, 29, 29);
  uint32_t lanes = size & 1 ? 2 : half_lanes / 2, is_scalar = field(word, 28, 28);
  if (field(word, 24, 24) && !field(word, 10, 10)) { /* by an element of a vector */
    uint32_t opcode = field(word, 15, 12);
    int is_float = size != 1 && !(unsigned_bit && opcode != 9) && (opcode == 1 || opcode == 5 || opcode == 9);
    lanes = is_scalar ? 1 : size == 0 ? half_lanes : size == 3 ? 2 : half_lanes / 2;
    arithmetic(b, is_float && opcode != 9, is_float ? lanes : 0);
    return;
  }
  if (field(word, 24, 24) || !field(word, 10, 10)) { /* constants, shifts, one source, permutations */
    b->count[VECTOR]++;
    return;
  }
  if (field(word, 21, 21)) { /* three vectors alike */
    uint32_t opcode = field(word, 15, 11);
    int is_fma = opcode == 25 && !unsigned_bit;
    arithmetic(b, is_fma, opcode >= 24 ? (is_scalar ? 1 : lanes) : 0);
  } else if (field(word, 22, 21) == 2 && field(word, 15, 14) == 0) { /* the same of halves */
    arithmetic(b, field(word, 13, 11) == 1 && !unsigned_bit, is_scalar ? 1 : half_lanes);
  } else {
    b->count[VECTOR]++;
  }
}

static void judge(block* b, uint32_t word) {
  uint32_t group = field(word, 28, 25);
  if ((group & 5) == 4)
    load_or_store(b, word);
  else if ((group & 7) == 7) {
    if (field(word, 30, 28) == 1)
      scalar_float(b, word);
    else
      vector_float(b, word);
  } else if ((group & 14) == 10)
    b->count[BRANCH]++;
  else if (group == 2)
    b->count[SVE]++;
  else
    b->count[SCALAR]++;
}

/* The plugin ----------------------------------------------------------------------- */

static void executed(unsigned cpu, void* data) {
  (void)cpu;
  __atomic_fetch_add(&((block*)data)->runs, 1, __ATOMIC_RELAXED);
}

static void translated(uint64_t id, struct qemu_plugin_tb* tb) {
  (void)id;
  block* b = calloc(1, sizeof *b);
  if (!b) abort();
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof word);
    judge(b, word);
  }
  b->next = __atomic_load_n(&blocks, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(&blocks, &b->next, b, 1, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) continue;
  qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0, b);
}

static void ended(uint64_t id, void* data) {
  (void)id;
  (void)data;
  uint64_t sum[FIELDS] = {0}, instructions = 0;
  for (const block* b = blocks; b; b = b->next)
    for (int i = 0; i < FIELDS; i++) sum[i] += b->runs * b->count[i];
  for (int i = 0; i <= SVE; i++) instructions += sum[i];
  FILE* file = fopen(output, "w");
  if (!file) return;
  fprintf(file, "{\"instructions\": %" PRIu64, instructions);
  for (int i = 0; i < FIELDS; i++) fprintf(file, ", \"%s\": %" PRIu64, NAMES[i], sum[i]);
  fprintf(file, "}\n");
  fclose(file);
}

EXPORT int qemu_plugin_install(uint64_t id, const info_t* info, int argc, char** argv) {
  for (int i = 0; i < argc; i++)
    if (strncmp(argv[i], "out=", 4) == 0) output = strdup(argv[i] + 4);
  if (!output || strcmp(info->target_name, "aarch64") != 0) {
    fprintf(stderr, "count: needs out=FILE and an aarch64 program\n");
    return -1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
