/* Runs an artifact for a foreign CPU, under an emulator or on the board itself, with TVM's runtime and nothing else.
 *
 *     host LIBRARY FEATURES INPUTS OUTPUTS TIMES ENTRY INPUT...
 *
 * FEATURES are names of /proc/cpuinfo, with commas between, that the CPU must have, or "-". ENTRY is the function to
 * call. An INPUT is the DLPack code and bits of a tensor, and its extents ("2:32:1:8" is float32 of 1x8). INPUTS holds the
 * tensors of any number of inferences one after the other, in the machine's own bytes. Each is computed TIMES times; all
 * outputs of the last time are appended to OUTPUTS. Exit status 3 and one line on stderr: this CPU or this runtime cannot
 * run the library.
 */
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <tvm/ffi/c_api.h>

enum { MOST_DIMS = 8, MOST_INPUTS = 16, FIRST_INPUT = 7, REFUSED = 3, CPU = 1, POOLED = 2, ALIGNMENT = 64 };

static void refuse(const char* what, const char* detail) {
  fprintf(stderr, "%s%s\n", what, detail ? detail : "");
  exit(REFUSED);
}

/* What the CPU has ------------------------------------------------------- */

#if defined(__aarch64__)
static const struct {
  const char* name;
  int word, bit; /* of AT_HWCAP or AT_HWCAP2 */
} FEATURES[] = {
    {"fp", 0, 0},        {"asimd", 0, 1},     {"atomics", 0, 8}, {"fphp", 0, 9},      {"asimdhp", 0, 10},
    {"asimdrdm", 0, 12}, {"jscvt", 0, 13},    {"fcma", 0, 14},   {"lrcpc", 0, 15},    {"asimddp", 0, 20},
    {"sve", 0, 22},      {"asimdfhm", 0, 23}, {"sve2", 1, 1},    {"i8mm", 1, 13},     {"bf16", 1, 14},
};

static int has_feature(const char* name) {
  for (size_t i = 0; i < sizeof FEATURES / sizeof *FEATURES; i++) {
    if (strcmp(FEATURES[i].name, name) == 0)
      return (int)(getauxval(FEATURES[i].word ? AT_HWCAP2 : AT_HWCAP) >> FEATURES[i].bit & 1);
  }
  return 0;
}
#else
static int has_feature(const char* name) {
  (void)name;
  return 1; /* nothing is asked of other CPUs */
}
#endif

static void check_features(char* wanted) {
  char missing[512] = "";
  if (strcmp(wanted, "-") == 0) return;
  for (char* name = strtok(wanted, ","); name; name = strtok(NULL, ",")) {
    if (has_feature(name) || strlen(missing) + strlen(name) + 3 > sizeof missing) continue;
    if (*missing) strcat(missing, ", ");
    strcat(missing, name);
  }
  if (*missing) refuse("it needs CPU features that this CPU lacks: ", missing);
}

/* TVM's runtime ------------------------------------------------------------ */

static int (*get_global)(const TVMFFIByteArray*, TVMFFIObjectHandle*);
static int (*call_function)(TVMFFIObjectHandle, TVMFFIAny*, int32_t, TVMFFIAny*);
static int (*tensor_from)(DLManagedTensor*, int32_t, int32_t, TVMFFIObjectHandle*);
static int (*release)(TVMFFIObjectHandle);
static void (*take_error)(TVMFFIObjectHandle*);

static void* open_library(const char* name) {
  void* library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
  if (!library) refuse("", dlerror());
  return library;
}

static void* symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (!found) refuse("", dlerror());
  return found;
}

static void open_runtime(void) {
  void* ffi = open_library("libtvm_ffi.so");
  *(void**)&get_global = symbol(ffi, "TVMFFIFunctionGetGlobal");
  *(void**)&call_function = symbol(ffi, "TVMFFIFunctionCall");
  *(void**)&tensor_from = symbol(ffi, "TVMFFITensorFromDLPack");
  *(void**)&release = symbol(ffi, "TVMFFIObjectDecRef");
  *(void**)&take_error = symbol(ffi, "TVMFFIErrorMoveFromRaised");
  open_library("libtvm_runtime.so");
}

static void fail(void) {
  TVMFFIObjectHandle error = NULL;
  take_error(&error);
  if (!error) refuse("TVM's runtime gave no reason", NULL);
  const TVMFFIErrorCell* cell = (const TVMFFIErrorCell*)((const char*)error + sizeof(TVMFFIObject));
  fprintf(stderr, "TVM's runtime failed with %.*s: %.*s\n", (int)cell->kind.size, cell->kind.data,
          (int)cell->message.size, cell->message.data);
  exit(REFUSED);
}

static TVMFFIAny text(const char* value) {
  TVMFFIAny any = {0};
  any.type_index = kTVMFFIRawStr;
  any.v_c_str = value;
  return any;
}

static TVMFFIAny number(int64_t value) {
  TVMFFIAny any = {0};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

static TVMFFIAny object(TVMFFIObjectHandle handle) {
  TVMFFIAny any = {0};
  any.type_index = ((TVMFFIObject*)handle)->type_index;
  any.v_obj = (TVMFFIObject*)handle;
  return any;
}

static TVMFFIAny call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count) {
  TVMFFIAny result = {0};
  if (call_function(function, arguments, count, &result)) fail();
  return result;
}

static TVMFFIObjectHandle global(const char* name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  if (get_global(&key, &function)) fail();
  if (!function) refuse("TVM's runtime has no ", name);
  return function;
}

static TVMFFIObjectHandle method(TVMFFIObjectHandle module, const char* name) {
  TVMFFIAny arguments[] = {object(module), text(name), {0}};
  arguments[2].type_index = kTVMFFIBool;
  TVMFFIAny found = call(global("ffi.ModuleGetFunction"), arguments, 3);
  if (found.type_index < kTVMFFIStaticObjectBegin) refuse("the library has no function ", name);
  return found.v_obj;
}

/* A virtual machine on the library; one of its functions. */
static TVMFFIObjectHandle open_entry(const char* library, const char* name) {
  TVMFFIAny path[] = {text(library), text("so")};
  TVMFFIObjectHandle module = call(global("ffi.Module.load_from_file.so"), path, 2).v_obj;
  TVMFFIObjectHandle machine = call(method(module, "vm_load_executable"), NULL, 0).v_obj;
  TVMFFIAny device[] = {number(CPU), number(0), number(POOLED)};
  call(method(machine, "vm_initialization"), device, 3);
  return method(machine, name);
}

/* Inputs and outputs ----------------------------------------------------------- */

static int64_t bytes_of(const DLTensor* tensor) {
  int64_t size = (tensor->dtype.bits + 7) / 8;
  for (int i = 0; i < tensor->ndim; i++) size *= tensor->shape[i];
  return size;
}

static void write_tensor(TVMFFIObjectHandle handle, FILE* outputs) {
  const DLTensor* tensor = (const DLTensor*)((const char*)handle + sizeof(TVMFFIObject));
  size_t size = (size_t)bytes_of(tensor);
  if (fwrite((const char*)tensor->data + tensor->byte_offset, 1, size, outputs) != size)
    refuse("cannot write the outputs", NULL);
}

static void write_result(TVMFFIAny result, FILE* outputs) {
  if (result.type_index == kTVMFFITensor) {
    write_tensor(result.v_obj, outputs);
    return;
  }
  if (result.type_index != kTVMFFIArray) refuse("the library answers with something that is no tensor", NULL);
  const TVMFFISeqCell* cell = (const TVMFFISeqCell*)((const char*)result.v_obj + sizeof(TVMFFIObject));
  for (int64_t i = 0; i < (int64_t)cell->size; i++) write_tensor(((TVMFFIAny*)cell->data)[i].v_obj, outputs);
}

static void keep(DLManagedTensor* self) { (void)self; }

typedef struct {
  DLManagedTensor tensor;
  int64_t shape[MOST_DIMS];
  size_t size;
} input;

/* Memory for an input as the command line describes it. */
static void make_input(input* made, const char* described) {
  char* rest = NULL;
  DLTensor* tensor = &made->tensor.dl_tensor;
  tensor->dtype.code = (uint8_t)strtol(described, &rest, 10);
  tensor->dtype.bits = *rest ? (uint8_t)strtol(rest + 1, &rest, 10) : 0;
  tensor->dtype.lanes = 1;
  while (*rest && tensor->ndim < MOST_DIMS) made->shape[tensor->ndim++] = strtoll(rest + 1, &rest, 10);
  tensor->device.device_type = kDLCPU;
  tensor->shape = made->shape;
  made->tensor.deleter = keep;
  made->size = (size_t)bytes_of(tensor);
  tensor->data = aligned_alloc(ALIGNMENT, (made->size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  if (!tensor->data) refuse("there is no memory for an input", NULL);
}

/* The next inference's, from the file; 0 at its end. */
static int read_inputs(input* made, int count, FILE* file) {
  for (int i = 0; i < count; i++)
    if (fread(made[i].tensor.dl_tensor.data, 1, made[i].size, file) != made[i].size) return 0;
  return 1;
}

int main(int argc, char** argv) {
  const int count = argc - FIRST_INPUT, times = count > 0 ? atoi(argv[5]) : 0;
  static input given[MOST_INPUTS];
  if (count < 1 || count > MOST_INPUTS)
    refuse("usage: host LIBRARY FEATURES INPUTS OUTPUTS TIMES ENTRY INPUT...", NULL);
  prctl(PR_SET_PDEATHSIG, SIGKILL); /* never outlive the command that asked */
  for (int i = 0; i < count; i++) make_input(&given[i], argv[FIRST_INPUT + i]);

  check_features(argv[2]);
  open_runtime();
  TVMFFIObjectHandle run = open_entry(argv[1], argv[6]);
  FILE *inputs = fopen(argv[3], "rb"), *outputs = fopen(argv[4], "wb");
  if (!inputs || !outputs) refuse("cannot open the inputs or the outputs", NULL);
  while (read_inputs(given, count, inputs)) {
    TVMFFIObjectHandle tensors[MOST_INPUTS];
    TVMFFIAny arguments[MOST_INPUTS];
    for (int i = 0; i < count; i++) {
      if (tensor_from(&given[i].tensor, 0, 1, &tensors[i])) fail();
      arguments[i] = object(tensors[i]);
    }
    for (int time = 0; time < times; time++) {
      TVMFFIAny result = call(run, arguments, count);
      if (time + 1 == times) write_result(result, outputs);
      release(result.v_obj);
    }
    for (int i = 0; i < count; i++) release(tensors[i]);
  }
  return fclose(outputs) ? REFUSED : 0;
}
