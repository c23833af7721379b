/* Calls one compiled kernel, for the counting plugin: without TVM's runtime, so that little else is counted.
 *
 *     kernel LIBRARY CALLS THREADS TYPE:DIM,DIM,... ...
 *
 * One TYPE (DLPack code, bits) and list of extents an argument, such as "2.32:1,56,56,48". Parallel loops are cut for
 * THREADS, and only the first thread's share is executed: no other has more, so it is what all wait for. The results are
 * therefore wrong, the counts are not. Prints how many parallel loops a call starts.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MOST_DIMS = 8, MOST_ARGUMENTS = 64, CPU = 1, ALIGNMENT = 64 };

static int threads, launches;

static void fail(const char* what) {
  fprintf(stderr, "%s\n", what ? what : "unknown error");
  exit(1);
}

/* What kernels ask of TVM's runtime ------------------------------------------ */

typedef struct {
  void* sync_handle;
  int32_t num_task;
} group;
typedef int (*task)(int, group*, void*);

static int launch(task body, void* data, int tasks) {
  group all = {NULL, tasks > 0 ? tasks : threads};
  launches++;
  return body(0, &all, data);
}

static int barrier(int index, group* all) {
  (void)index, (void)all;
  return 0;
}

static void* allocate(uint64_t bytes) {
  void* found = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  if (!found) fail("out of memory");
  return found;
}

void* TVMBackendAllocWorkspace(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  return allocate(bytes);
}

int TVMBackendFreeWorkspace(int device, int id, void* space) {
  (void)device, (void)id;
  free(space);
  return 0;
}

static void raised(const char* kind, const char* message) {
  fprintf(stderr, "%s: ", kind);
  fail(message);
}

static void raised_in_parts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) fputs(parts[i] ? parts[i] : "", stderr);
  fail("");
}

int TVMBackendParallelLaunch(task body, void* data, int tasks) { return launch(body, data, tasks); }
int TVMBackendParallelBarrier(int index, group* all) { return barrier(index, all); }
void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) { raised(kind, message); }
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  raised_in_parts(kind, parts, count);
}

/* A library holds pointers to some of them, which whoever loads it has to fill in. */
static void connect(void* library) {
  const struct {
    const char* name;
    void* function;
  } known[] = {
      {"__TVMBackendParallelLaunch", (void*)launch},
      {"__TVMBackendParallelBarrier", (void*)barrier},
      {"__TVMFFIErrorSetRaisedFromCStr", (void*)raised},
      {"__TVMFFIErrorSetRaisedFromCStrParts", (void*)raised_in_parts},
      {"__TVMBackendAllocWorkspace", (void*)TVMBackendAllocWorkspace},
      {"__TVMBackendFreeWorkspace", (void*)TVMBackendFreeWorkspace},
  };
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    void** place = dlsym(library, known[i].name);
    if (place) *place = known[i].function;
  }
}

/* The call ------------------------------------------------------------------- */

static DLTensor* tensor(char* text) {
  DLTensor* made = calloc(1, sizeof *made);
  int64_t* extents = calloc(MOST_DIMS, sizeof *extents);
  unsigned code, bits;
  int64_t count = 1;
  if (!made || !extents || sscanf(text, "%u.%u", &code, &bits) != 2) fail("an argument is not understood");
  char* rest = strchr(text, ':');
  for (char* part = rest ? strtok(rest + 1, ",") : NULL; part; part = strtok(NULL, ",")) {
    if (made->ndim == MOST_DIMS) fail("an argument has too many dimensions");
    count *= extents[made->ndim++] = strtoll(part, NULL, 10);
  }
  made->device.device_type = CPU;
  made->dtype = (DLDataType){(uint8_t)code, (uint8_t)bits, 1};
  made->shape = extents;
  made->data = allocate((uint64_t)count * bits / 8);
  if (code == 2 && bits == 32)
    for (int64_t i = 0; i < count; i++) ((float*)made->data)[i] = (float)(i % 17) / 16 - 0.5f;
  else
    memset(made->data, 0, (size_t)count * bits / 8);
  return made;
}

int main(int argc, char** argv) {
  if (argc < 4 || argc - 4 > MOST_ARGUMENTS) fail("usage: kernel LIBRARY CALLS THREADS TYPE:DIM,DIM,... ...");
  int calls = atoi(argv[2]), count = argc - 4;
  threads = atoi(argv[3]);
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) fail(dlerror());
  connect(library);
  TVMFFISafeCallType call = (TVMFFISafeCallType)dlsym(library, "__tvm_ffi_main");
  if (!call) fail(dlerror());
  TVMFFIAny arguments[MOST_ARGUMENTS], result;
  memset(arguments, 0, sizeof arguments);
  for (int i = 0; i < count; i++) {
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = tensor(argv[4 + i]);
  }
  for (int i = 0; i < calls; i++) {
    launches = 0;
    memset(&result, 0, sizeof result);
    if (call(NULL, arguments, count, &result)) fail("the kernel refuses its arguments");
  }
  printf("%d\n", launches);
  return 0;
}
