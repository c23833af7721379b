// The OpenCL devices of this machine as TVM's runtime wants a device: memory, copies, a queue, properties, a timer.
//
// Each device has one in-order queue that all threads share: TVM's memory pool hands a buffer on as soon as its last
// user has been enqueued, which only one order of work makes right. A tensor's data pointer is the cl_mem itself.
#pragma once

#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>
#include <tvm/runtime/device_api.h>
// TVM's wheel ships this header without those that it includes; the timer only mentions it.
#define TVM_RUNTIME_TENSOR_H_
#include <tvm/runtime/timer.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"

namespace saevit {

namespace ffi = tvm::ffi;
using tvm::runtime::DeviceAttrKind;

inline std::string StatusName(cl_int status) {
  switch (status) {
    case CL_DEVICE_NOT_AVAILABLE: return "CL_DEVICE_NOT_AVAILABLE";
    case CL_COMPILER_NOT_AVAILABLE: return "CL_COMPILER_NOT_AVAILABLE";
    case CL_MEM_OBJECT_ALLOCATION_FAILURE: return "CL_MEM_OBJECT_ALLOCATION_FAILURE";
    case CL_OUT_OF_RESOURCES: return "CL_OUT_OF_RESOURCES";
    case CL_OUT_OF_HOST_MEMORY: return "CL_OUT_OF_HOST_MEMORY";
    case CL_IMAGE_FORMAT_NOT_SUPPORTED: return "CL_IMAGE_FORMAT_NOT_SUPPORTED";
    case CL_INVALID_IMAGE_SIZE: return "CL_INVALID_IMAGE_SIZE";
    case CL_BUILD_PROGRAM_FAILURE: return "CL_BUILD_PROGRAM_FAILURE";
    case CL_INVALID_WORK_GROUP_SIZE: return "CL_INVALID_WORK_GROUP_SIZE";
    case CL_INVALID_WORK_ITEM_SIZE: return "CL_INVALID_WORK_ITEM_SIZE";
    case CL_INVALID_BUFFER_SIZE: return "CL_INVALID_BUFFER_SIZE";
    default: return "OpenCL status " + std::to_string(status);
  }
}

// What the user can do about a failure of the driver.
inline std::string Advice(cl_int status) {
  switch (status) {
    case CL_MEM_OBJECT_ALLOCATION_FAILURE:
    case CL_OUT_OF_HOST_MEMORY:
    case CL_INVALID_BUFFER_SIZE:
      return "its memory does not suffice; use a smaller batch or image size";
    case CL_OUT_OF_RESOURCES:
      return "it is out of memory, or the system has reset it; use a smaller batch or image size, or start again";
    case CL_DEVICE_NOT_AVAILABLE:
      return "it is gone, or the system has reset it; start again, and look after the device if that does not help";
    case CL_INVALID_WORK_GROUP_SIZE:
    case CL_INVALID_WORK_ITEM_SIZE:
      return "the kernels were built for a larger device; build for a target with smaller work-groups";
    case CL_IMAGE_FORMAT_NOT_SUPPORTED:
    case CL_INVALID_IMAGE_SIZE:
      return "the kernels were built for a device with other images; build for a target that reads buffers alone";
    default:
      return "update the driver, or use another device";
  }
}

struct Gpu {
  cl_platform_id platform;
  cl_device_id id;
  std::string name;
  cl_context context = nullptr;
  // Holds a kernel's arguments and its place in the queue together.
  std::mutex lock;

  void Check(cl_int status, const std::string& doing) const {
    if (status != CL_SUCCESS) {
      TVM_FFI_THROW(OpenCLError) << "the OpenCL device '" << name << "' could not " << doing << " ("
                                 << StatusName(status) << "): " << Advice(status) << ".";
    }
  }

  // All that makes compiled code of one driver useless to another.
  std::string Identity() const {
    return PlatformText(platform, CL_PLATFORM_NAME) + "|" + PlatformText(platform, CL_PLATFORM_VERSION) + "|" +
           DeviceText(id, CL_DEVICE_VENDOR) + "|" + name + "|" + DeviceText(id, CL_DEVICE_VERSION) + "|" +
           DeviceText(id, CL_DRIVER_VERSION);
  }

  void Open() {
    std::call_once(opened_, [this] {
      cl_int status;
      context = Cl().clCreateContext(nullptr, 1, &id, nullptr, nullptr, &status);
      Check(status, "be opened");
      queue_ = Cl().clCreateCommandQueue(context, id, 0, &status);
      Check(status, "create a queue");
    });
  }

  // The buffer as an image of four numbers a texel, which lives until the buffer goes. Under the lock.
  cl_mem Image(cl_mem buffer, cl_uint numbers) {
    cl_mem& image = images_[{buffer, numbers}];
    if (image != nullptr) return image;
    size_t size = 0;
    Check(Cl().clGetMemObjectInfo(buffer, CL_MEM_SIZE, sizeof(size), &size, nullptr), "tell the size of a buffer");
    cl_image_format format{CL_RGBA, numbers};
    cl_image_desc what{};
    what.type = CL_MEM_OBJECT_IMAGE1D_BUFFER;
    what.width = size / (numbers == CL_FLOAT ? 16 : 8);
    what.buffer = buffer;
    cl_int status;
    cl_mem made = Cl().clCreateImage(context, CL_MEM_READ_ONLY, &format, &what, nullptr, &status);
    Check(status, "see weights of " + std::to_string(size) + " bytes as an image");
    return image = made;
  }

  // Its images hold a buffer as long as they are there.
  void Release(cl_mem buffer) {
    std::lock_guard<std::mutex> guard(lock);
    auto first = images_.lower_bound({buffer, 0}), last = first;
    for (; last != images_.end() && last->first.first == buffer; ++last) {
      if (last->second != nullptr) Cl().clReleaseMemObject(last->second);
    }
    images_.erase(first, last);
    Cl().clReleaseMemObject(buffer);
  }

  cl_command_queue Queue() const { return timers_ ? timed_ : queue_; }

  void Finish() {
    if (queue_) Check(Cl().clFinish(Queue()), "finish its work");
  }

  // While a timer runs, work goes to a queue that takes times, and each kernel leaves an event.
  void StartTimer() {
    std::lock_guard<std::mutex> guard(lock);
    Finish();
    if (timed_ == nullptr) {
      cl_int status;
      timed_ = Cl().clCreateCommandQueue(context, id, CL_QUEUE_PROFILING_ENABLE, &status);
      Check(status, "create a queue that takes times");
    }
    ++timers_;
  }

  // All that was timed is done, or has failed.
  void EndTimer() {
    std::lock_guard<std::mutex> guard(lock);
    Cl().clFinish(timed_);
    if (--timers_ > 0) return;
    for (cl_event event : events_) Cl().clReleaseEvent(event);
    events_.clear();
  }

  cl_event* NewEvent() {
    if (timers_ == 0) return nullptr;
    events_.push_back(nullptr);
    return &events_.back();
  }

  // For a kernel that was refused.
  void DropEvent() {
    if (timers_ > 0) events_.pop_back();
  }

  size_t Events() const { return events_.size(); }

  // The time that kernels have run since there were `first` events.
  int64_t Nanoseconds(size_t first) {
    Finish();
    int64_t total = 0;
    for (size_t i = first; i < events_.size(); ++i) {
      cl_ulong start = 0, end = 0;
      Cl().clGetEventProfilingInfo(events_[i], CL_PROFILING_COMMAND_START, sizeof(start), &start, nullptr);
      Cl().clGetEventProfilingInfo(events_[i], CL_PROFILING_COMMAND_END, sizeof(end), &end, nullptr);
      total += static_cast<int64_t>(end - start);
    }
    return total;
  }

 private:
  std::once_flag opened_;
  cl_command_queue queue_ = nullptr, timed_ = nullptr;
  int timers_ = 0;
  std::vector<cl_event> events_;
  std::map<std::pair<cl_mem, cl_uint>, cl_mem> images_;
};

class Gpus {
 public:
  // Never destroyed, like the driver.
  static Gpus& All() {
    static Gpus* all = new Gpus();
    return *all;
  }

  size_t Count() const { return found_.size(); }

  Gpu& At(int index) {
    if (getpid() != process_) {
      TVM_FFI_THROW(OpenCLError) << "this process was forked after OpenCL was first used, which no driver survives: "
                                 << "start processes with 'spawn', or use OpenCL in the child alone.";
    }
    if (index < 0 || static_cast<size_t>(index) >= found_.size()) {
      TVM_FFI_THROW(OpenCLError) << "no OpenCL device " << index << ": " << Shortage() << ".";
    }
    Gpu& gpu = *found_[index];
    gpu.Open();
    return gpu;
  }

  // Never fails, as whoever gives memory back expects. A fork's child has no business with its parent's.
  void Release(int index, cl_mem buffer) {
    if (getpid() == process_) found_[index]->Release(buffer);
  }

  // One sentence where nothing can run.
  void Require() {
    if (found_.empty()) {
      TVM_FFI_THROW(OpenCLError) << Shortage() << ": install the GPU's driver, or PoCL for the CPU.";
    }
    At(0);
  }

  static int& Current() {
    static thread_local int index = 0;
    return index;
  }

 private:
  std::vector<std::unique_ptr<Gpu>> found_;
  pid_t process_ = getpid();

  Gpus() {
    if (!Cl().missing.empty()) return;
    cl_uint count = 0;
    if (Cl().clGetPlatformIDs(0, nullptr, &count) != CL_SUCCESS || count == 0) return;
    std::vector<cl_platform_id> platforms(count);
    Cl().clGetPlatformIDs(count, platforms.data(), nullptr);
    for (cl_platform_id platform : platforms) Add(platform);
    std::stable_partition(found_.begin(), found_.end(), [](const std::unique_ptr<Gpu>& gpu) {
      return DeviceNumber<cl_bitfield>(gpu->id, CL_DEVICE_TYPE) & CL_DEVICE_TYPE_GPU;
    });
  }

  void Add(cl_platform_id platform) {
    cl_uint count = 0;
    if (Cl().clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 0, nullptr, &count) != CL_SUCCESS) return;
    std::vector<cl_device_id> devices(count);
    Cl().clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, count, devices.data(), nullptr);
    for (cl_device_id device : devices) {
      auto gpu = std::make_unique<Gpu>();
      gpu->platform = platform;
      gpu->id = device;
      gpu->name = DeviceText(device, CL_DEVICE_NAME);
      found_.push_back(std::move(gpu));
    }
  }

  std::string Shortage() const {
    if (!Cl().missing.empty()) return Cl().missing;
    return found_.empty() ? "no OpenCL driver offers a device" : "there are " + std::to_string(found_.size());
  }
};

class OpenCLDevice final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(DLDevice device) final { Gpus::Current() = device.device_id; }

  void GetAttr(DLDevice device, DeviceAttrKind kind, ffi::Any* result) final {
    if (kind == tvm::runtime::kExist) {
      *result = static_cast<int64_t>(static_cast<size_t>(device.device_id) < Gpus::All().Count());
      return;
    }
    Gpu& gpu = Gpus::All().At(device.device_id);
    switch (kind) {
      case tvm::runtime::kMaxThreadsPerBlock:
        *result = static_cast<int64_t>(DeviceNumber<size_t>(gpu.id, CL_DEVICE_MAX_WORK_GROUP_SIZE));
        break;
      case tvm::runtime::kWarpSize:
        *result = int64_t{1};  // OpenCL 1.2 does not say
        break;
      case tvm::runtime::kMaxSharedMemoryPerBlock:
        *result = static_cast<int64_t>(DeviceNumber<cl_ulong>(gpu.id, CL_DEVICE_LOCAL_MEM_SIZE));
        break;
      case tvm::runtime::kComputeVersion:
        *result = ffi::String(DeviceText(gpu.id, CL_DEVICE_VERSION));
        break;
      case tvm::runtime::kDeviceName:
        *result = ffi::String(gpu.name);
        break;
      case tvm::runtime::kMaxClockRate:  // in kHz, as for every device of TVM's
        *result = static_cast<int64_t>(DeviceNumber<cl_uint>(gpu.id, CL_DEVICE_MAX_CLOCK_FREQUENCY)) * 1000;
        break;
      case tvm::runtime::kMultiProcessorCount:
        *result = static_cast<int64_t>(DeviceNumber<cl_uint>(gpu.id, CL_DEVICE_MAX_COMPUTE_UNITS));
        break;
      case tvm::runtime::kMaxThreadDimensions: {
        size_t extents[3] = {1, 1, 1};
        Cl().clGetDeviceInfo(gpu.id, CL_DEVICE_MAX_WORK_ITEM_SIZES, sizeof(extents), extents, nullptr);
        std::ostringstream text;
        text << "[" << extents[0] << ", " << extents[1] << ", " << extents[2] << "]";
        *result = ffi::String(text.str());
        break;
      }
      case tvm::runtime::kDriverVersion:
        *result = ffi::String(DeviceText(gpu.id, CL_DRIVER_VERSION));
        break;
      case tvm::runtime::kL2CacheSizeBytes:
        *result = static_cast<int64_t>(DeviceNumber<cl_ulong>(gpu.id, CL_DEVICE_GLOBAL_MEM_CACHE_SIZE));
        break;
      case tvm::runtime::kTotalGlobalMemory:
        *result = static_cast<int64_t>(DeviceNumber<cl_ulong>(gpu.id, CL_DEVICE_GLOBAL_MEM_SIZE));
        break;
      default:  // unknown to OpenCL: None, as TVM expects
        break;
    }
  }

  void* AllocDataSpace(DLDevice device, size_t bytes, size_t, DLDataType) final {
    Gpu& gpu = Gpus::All().At(device.device_id);
    cl_int status;
    // OpenCL has no buffer of nothing.
    cl_mem buffer = Cl().clCreateBuffer(gpu.context, CL_MEM_READ_WRITE, std::max<size_t>(bytes, 1), nullptr, &status);
    gpu.Check(status, "reserve " + std::to_string(bytes) + " bytes");
    return buffer;
  }

  using DeviceAPI::AllocDataSpace;

  void FreeDataSpace(DLDevice device, void* data) final {
    Gpus::All().Release(device.device_id, static_cast<cl_mem>(data));
  }

  void StreamSync(DLDevice device, TVMStreamHandle) final { Gpus::All().At(device.device_id).Finish(); }

  // There is one stream.
  void SetStream(DLDevice, TVMStreamHandle) final {}
  TVMStreamHandle GetCurrentStream(DLDevice) final { return nullptr; }

 protected:
  using DeviceAPI::CopyDataFromTo;

  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes, DLDevice source,
                      DLDevice destination, DLDataType, TVMStreamHandle) final {
    if (bytes == 0) return;
    bool reads = source.device_type == kDLOpenCL, writes = destination.device_type == kDLOpenCL;
    if (reads && writes && source.device_id != destination.device_id) {
      std::vector<char> between(bytes);
      Read(source, from, from_offset, between.data(), bytes);
      Write(destination, to, to_offset, between.data(), bytes);
    } else if (reads && writes) {
      Gpu& gpu = Gpus::All().At(source.device_id);
      gpu.Check(Cl().clEnqueueCopyBuffer(gpu.Queue(), Memory(from), Memory(to), from_offset, to_offset, bytes, 0,
                                         nullptr, nullptr),
                "copy memory");
    } else if (reads) {
      Read(source, from, from_offset, static_cast<char*>(to) + to_offset, bytes);
    } else {
      Write(destination, to, to_offset, static_cast<const char*>(from) + from_offset, bytes);
    }
  }

 private:
  static cl_mem Memory(const void* data) { return static_cast<cl_mem>(const_cast<void*>(data)); }

  // Both wait: whoever owns the host's memory may use it again at once.
  static void Read(DLDevice device, const void* from, size_t offset, void* to, size_t bytes) {
    Gpu& gpu = Gpus::All().At(device.device_id);
    gpu.Check(
        Cl().clEnqueueReadBuffer(gpu.Queue(), Memory(from), CL_TRUE, offset, bytes, to, 0, nullptr, nullptr),
        "give its results");
  }

  static void Write(DLDevice device, void* to, size_t offset, const void* from, size_t bytes) {
    Gpu& gpu = Gpus::All().At(device.device_id);
    gpu.Check(
        Cl().clEnqueueWriteBuffer(gpu.Queue(), Memory(to), CL_TRUE, offset, bytes, from, 0, nullptr, nullptr),
        "take its input");
  }
};

// The time that the device spent in kernels, without the host's share.
class OpenCLTimer final : public tvm::runtime::TimerNode {
 public:
  explicit OpenCLTimer(DLDevice device) : gpu_(Gpus::All().At(device.device_id)) {}

  // What was timed may have failed, and then nobody stops the timer.
  ~OpenCLTimer() {
    if (runs_) gpu_.EndTimer();
  }

  void Start() final {
    gpu_.StartTimer();
    runs_ = true;
    first_ = gpu_.Events();
  }

  void Stop() final {
    nanoseconds_ = gpu_.Nanoseconds(first_);
    gpu_.EndTimer();
    runs_ = false;
  }

  int64_t SyncAndGetElapsedNanos() final { return nanoseconds_; }

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("saevit.OpenCLTimer", OpenCLTimer, TimerNode);

 private:
  Gpu& gpu_;
  bool runs_ = false;
  size_t first_ = 0;
  int64_t nanoseconds_ = 0;
};

}  // namespace saevit
