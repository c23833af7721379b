/* Runs an artifact for a foreign CPU, under an emulator or on the board itself, with TVM's runtime and nothing else.
 *
 *     host LIBRARY FEATURES INPUTS OUTPUTS TIMES TYPE DIM...
 *
 * FEATURES are names of /proc/cpuinfo, with commas between, that the CPU must have, or "-". INPUTS holds any number of
 * tensors of the given extents one after the other, in the machine's own bytes; TYPE is their DLPack code and bits
 * ("2:32" is float32). Each is computed TIMES times; all outputs of the last time are appended to OUTPUTS. Exit status 3
 * and one line on stderr: this CPU or this runtime cannot run the library.
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

enum { MOST_DIMS = 8, REFUSED = 3, CPU = 1, POOLED = 2, ALIGNMENT = 64 };

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

/* A virtual machine on the library; its main function. */
static TVMFFIObjectHandle open_main(const char* library) {
  TVMFFIAny path[] = {text(library), text("so")};
  TVMFFIObjectHandle module = call(global("ffi.Module.load_from_file.so"), path, 2).v_obj;
  TVMFFIObjectHandle machine = call(method(module, "vm_load_executable"), NULL, 0).v_obj;
  TVMFFIAny device[] = {number(CPU), number(0), number(POOLED)};
  call(method(machine, "vm_initialization"), device, 3);
  return method(machine, "main");
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

int main(int argc, char** argv) {
  if (argc < 8 || argc > 7 + MOST_DIMS) refuse("usage: host LIBRARY FEATURES INPUTS OUTPUTS TIMES TYPE DIM...", NULL);
  prctl(PR_SET_PDEATHSIG, SIGKILL); /* never outlive the command that asked */
  int64_t shape[MOST_DIMS];
  int code = 0, bits = 0, times = atoi(argv[5]);
  sscanf(argv[6], "%d:%d", &code, &bits);
  DLManagedTensor input = {0};
  input.dl_tensor.device.device_type = kDLCPU;
  input.dl_tensor.ndim = argc - 7;
  input.dl_tensor.dtype = (DLDataType){(uint8_t)code, (uint8_t)bits, 1};
  input.dl_tensor.shape = shape;
  input.deleter = keep;
  for (int i = 0; i < argc - 7; i++) shape[i] = atoll(argv[7 + i]);

  check_features(argv[2]);
  open_runtime();
  TVMFFIObjectHandle run = open_main(argv[1]);
  FILE *inputs = fopen(argv[3], "rb"), *outputs = fopen(argv[4], "wb");
  size_t size = (size_t)bytes_of(&input.dl_tensor);
  input.dl_tensor.data = aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  if (!inputs || !outputs || !input.dl_tensor.data) refuse("cannot open the inputs or the outputs", NULL);
  while (fread(input.dl_tensor.data, 1, size, inputs) == size) {
    TVMFFIObjectHandle tensor = NULL;
    if (tensor_from(&input, 0, 1, &tensor)) fail();
    for (int i = 0; i < times; i++) {
      TVMFFIAny argument = object(tensor);
      TVMFFIAny result = call(run, &argument, 1);
      if (i + 1 == times) write_result(result, outputs);
      release(result.v_obj);
    }
    release(tensor);
  }
  return fclose(outputs) ? REFUSED : 0;
}
