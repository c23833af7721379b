// The OpenCL driver, found when the program runs: nothing of a vendor's is needed to compile this.
//
// Only what the plugin calls is declared. Names, values and signatures are those of the OpenCL 1.2 interface.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

typedef struct _cl_platform_id* cl_platform_id;
typedef struct _cl_device_id* cl_device_id;
typedef struct _cl_context* cl_context;
typedef struct _cl_command_queue* cl_command_queue;
typedef struct _cl_mem* cl_mem;
typedef struct _cl_program* cl_program;
typedef struct _cl_kernel* cl_kernel;
typedef struct _cl_event* cl_event;
typedef int32_t cl_int;
typedef uint32_t cl_uint;
typedef uint64_t cl_ulong;
typedef cl_ulong cl_bitfield;

enum : cl_int {
  CL_SUCCESS = 0,
  CL_DEVICE_NOT_FOUND = -1,
  CL_DEVICE_NOT_AVAILABLE = -2,
  CL_COMPILER_NOT_AVAILABLE = -3,
  CL_MEM_OBJECT_ALLOCATION_FAILURE = -4,
  CL_OUT_OF_RESOURCES = -5,
  CL_OUT_OF_HOST_MEMORY = -6,
  CL_IMAGE_FORMAT_NOT_SUPPORTED = -10,
  CL_BUILD_PROGRAM_FAILURE = -11,
  CL_INVALID_IMAGE_SIZE = -40,
  CL_INVALID_KERNEL_NAME = -46,
  CL_INVALID_WORK_GROUP_SIZE = -54,
  CL_INVALID_WORK_ITEM_SIZE = -55,
  CL_INVALID_BUFFER_SIZE = -61,
};

enum : cl_uint {
  CL_PLATFORM_VERSION = 0x0901,
  CL_PLATFORM_NAME = 0x0902,
  CL_DEVICE_TYPE = 0x1000,
  CL_DEVICE_MAX_COMPUTE_UNITS = 0x1002,
  CL_DEVICE_MAX_WORK_GROUP_SIZE = 0x1004,
  CL_DEVICE_MAX_WORK_ITEM_SIZES = 0x1005,
  CL_DEVICE_MAX_CLOCK_FREQUENCY = 0x100C,
  CL_DEVICE_IMAGE_SUPPORT = 0x1016,
  CL_DEVICE_GLOBAL_MEM_CACHE_SIZE = 0x101E,
  CL_DEVICE_GLOBAL_MEM_SIZE = 0x101F,
  CL_DEVICE_LOCAL_MEM_SIZE = 0x1023,
  CL_DEVICE_NAME = 0x102B,
  CL_DEVICE_VENDOR = 0x102C,
  CL_DRIVER_VERSION = 0x102D,
  CL_DEVICE_VERSION = 0x102F,
  CL_RGBA = 0x10B5,
  CL_HALF_FLOAT = 0x10DD,
  CL_FLOAT = 0x10DE,
  CL_MEM_OBJECT_IMAGE1D_BUFFER = 0x10F6,
  CL_MEM_SIZE = 0x1102,
  CL_PROGRAM_BINARY_SIZES = 0x1165,
  CL_PROGRAM_BINARIES = 0x1166,
  CL_PROGRAM_BUILD_LOG = 0x1183,
  CL_PROFILING_COMMAND_START = 0x1282,
  CL_PROFILING_COMMAND_END = 0x1283,
};

constexpr cl_bitfield CL_DEVICE_TYPE_GPU = 1 << 2;
constexpr cl_bitfield CL_DEVICE_TYPE_ALL = 0xFFFFFFFF;
constexpr cl_bitfield CL_QUEUE_PROFILING_ENABLE = 1 << 1;
constexpr cl_bitfield CL_MEM_READ_WRITE = 1 << 0;
constexpr cl_bitfield CL_MEM_READ_ONLY = 1 << 2;
constexpr cl_uint CL_TRUE = 1;

struct cl_image_format {
  cl_uint order, numbers;
};

struct cl_image_desc {
  cl_uint type;
  size_t width, height, depth, array_size, row_pitch, slice_pitch;
  cl_uint mip_levels, samples;
  cl_mem buffer;
};

// Result, name, parameters of every function that is called.
#define SAEVIT_CL_FUNCTIONS(X)                                                                                   \
  X(cl_int, clGetPlatformIDs, (cl_uint, cl_platform_id*, cl_uint*))                                              \
  X(cl_int, clGetPlatformInfo, (cl_platform_id, cl_uint, size_t, void*, size_t*))                                \
  X(cl_int, clGetDeviceIDs, (cl_platform_id, cl_bitfield, cl_uint, cl_device_id*, cl_uint*))                     \
  X(cl_int, clGetDeviceInfo, (cl_device_id, cl_uint, size_t, void*, size_t*))                                    \
  X(cl_context, clCreateContext, (const intptr_t*, cl_uint, const cl_device_id*, void*, void*, cl_int*))         \
  X(cl_command_queue, clCreateCommandQueue, (cl_context, cl_device_id, cl_bitfield, cl_int*))                    \
  X(cl_mem, clCreateBuffer, (cl_context, cl_bitfield, size_t, void*, cl_int*))                                   \
  X(cl_mem, clCreateImage,                                                                                       \
    (cl_context, cl_bitfield, const cl_image_format*, const cl_image_desc*, void*, cl_int*))                     \
  X(cl_int, clGetMemObjectInfo, (cl_mem, cl_uint, size_t, void*, size_t*))                                       \
  X(cl_int, clReleaseMemObject, (cl_mem))                                                                        \
  X(cl_int, clEnqueueReadBuffer,                                                                                 \
    (cl_command_queue, cl_mem, cl_uint, size_t, size_t, void*, cl_uint, const cl_event*, cl_event*))             \
  X(cl_int, clEnqueueWriteBuffer,                                                                                \
    (cl_command_queue, cl_mem, cl_uint, size_t, size_t, const void*, cl_uint, const cl_event*, cl_event*))       \
  X(cl_int, clEnqueueCopyBuffer,                                                                                 \
    (cl_command_queue, cl_mem, cl_mem, size_t, size_t, size_t, cl_uint, const cl_event*, cl_event*))             \
  X(cl_program, clCreateProgramWithSource, (cl_context, cl_uint, const char**, const size_t*, cl_int*))          \
  X(cl_program, clCreateProgramWithBinary,                                                                       \
    (cl_context, cl_uint, const cl_device_id*, const size_t*, const unsigned char**, cl_int*, cl_int*))          \
  X(cl_int, clBuildProgram, (cl_program, cl_uint, const cl_device_id*, const char*, void*, void*))               \
  X(cl_int, clGetProgramBuildInfo, (cl_program, cl_device_id, cl_uint, size_t, void*, size_t*))                  \
  X(cl_int, clGetProgramInfo, (cl_program, cl_uint, size_t, void*, size_t*))                                     \
  X(cl_int, clReleaseProgram, (cl_program))                                                                      \
  X(cl_kernel, clCreateKernel, (cl_program, const char*, cl_int*))                                               \
  X(cl_int, clReleaseKernel, (cl_kernel))                                                                        \
  X(cl_int, clSetKernelArg, (cl_kernel, cl_uint, size_t, const void*))                                           \
  X(cl_int, clEnqueueNDRangeKernel,                                                                              \
    (cl_command_queue, cl_kernel, cl_uint, const size_t*, const size_t*, const size_t*, cl_uint,                 \
     const cl_event*, cl_event*))                                                                                \
  X(cl_int, clFinish, (cl_command_queue))                                                                        \
  X(cl_int, clGetEventProfilingInfo, (cl_event, cl_uint, size_t, void*, size_t*))                                \
  X(cl_int, clReleaseEvent, (cl_event))

namespace saevit {

struct Driver {
#define SAEVIT_CL_MEMBER(result, name, parameters) result(*name) parameters = nullptr;
  SAEVIT_CL_FUNCTIONS(SAEVIT_CL_MEMBER)
#undef SAEVIT_CL_MEMBER

  // Why there is no driver; empty when there is one.
  std::string missing;

  Driver() {
    void* library = Open();
    if (library == nullptr) {
      missing = "there is no OpenCL library (libOpenCL.so.1)";
      return;
    }
#define SAEVIT_CL_RESOLVE(result, name, parameters)                          \
  name = reinterpret_cast<result(*) parameters>(dlsym(library, #name));      \
  if (name == nullptr) missing = "the OpenCL library lacks the function " #name;
    SAEVIT_CL_FUNCTIONS(SAEVIT_CL_RESOLVE)
#undef SAEVIT_CL_RESOLVE
  }

 private:
  static void* Open() {
    // The loader's own name, what phones have instead, and the whole driver of Mali boards without a loader.
    for (const char* name : {"libOpenCL.so.1", "libOpenCL.so", "/vendor/lib64/libOpenCL.so",
                             "/system/vendor/lib64/libOpenCL.so", "/vendor/lib64/egl/libGLES_mali.so", "libmali.so.1",
                             "libmali.so"}) {
      if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
    }
    return nullptr;
  }
};

// Never destroyed: buffers may be given back while the process ends.
inline Driver& Cl() {
  static Driver* driver = new Driver();
  return *driver;
}

// A property that is a text: of a platform, a device or a build.
template <typename Query>
std::string TextProperty(Query query) {
  size_t size = 0;
  if (query(0, nullptr, &size) != CL_SUCCESS || size == 0) return "";
  std::string text(size, '\0');
  if (query(size, &text[0], nullptr) != CL_SUCCESS) return "";
  while (!text.empty() && (text.back() == '\0' || text.back() == '\n' || text.back() == ' ')) text.pop_back();
  return text;
}

inline std::string DeviceText(cl_device_id device, cl_uint what) {
  return TextProperty([=](size_t n, void* to, size_t* size) { return Cl().clGetDeviceInfo(device, what, n, to, size); });
}

inline std::string PlatformText(cl_platform_id platform, cl_uint what) {
  return TextProperty(
      [=](size_t n, void* to, size_t* size) { return Cl().clGetPlatformInfo(platform, what, n, to, size); });
}

inline std::string BuildLog(cl_program program, cl_device_id device) {
  return TextProperty([=](size_t n, void* to, size_t* size) {
    return Cl().clGetProgramBuildInfo(program, device, CL_PROGRAM_BUILD_LOG, n, to, size);
  });
}

template <typename Number>
Number DeviceNumber(cl_device_id device, cl_uint what) {
  Number value{};
  Cl().clGetDeviceInfo(device, what, sizeof(value), &value, nullptr);
  return value;
}

}  // namespace saevit
