// An OpenCL device for TVM's runtime as it is installed: loading this library registers the device, its timer, and
// the loader of the OpenCL kernels inside a compiled model.
#include <tvm/ffi/cast.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/reflection/registry.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cache.h"
#include "device.h"

namespace saevit {

// One kernel as the compiler describes it.
struct Signature {
  std::string name;
  std::vector<DLDataType> parameters;
  std::vector<cl_uint> images;  // of each parameter: the numbers of the image that it is, 0 where it is none
  std::vector<int> extents;  // of each launch extent: 0 to 2 for work-groups, 3 to 5 for work-items
};

// The bytes of a compiled module: format, signatures by name, source.
class Reader {
 public:
  explicit Reader(const std::string& bytes) : bytes_(bytes) {}

  template <typename Number>
  Number Take() {
    Number value;
    memcpy(&value, Bytes(sizeof(value)), sizeof(value));
    return value;
  }

  std::string Text() {
    uint64_t size = Take<uint64_t>();
    return std::string(Bytes(size), size);
  }

  Signature TakeSignature() {
    Signature found;
    Text();  // the name, which comes again
    found.name = Text();
    for (uint64_t left = Take<uint64_t>(); left > 0; --left) {
      DLDataType type;
      type.code = Take<uint8_t>();
      type.bits = Take<uint8_t>();
      type.lanes = Take<uint16_t>();
      found.parameters.push_back(type);
    }
    for (uint64_t left = Take<uint64_t>(); left > 0; --left) found.extents.push_back(Extent(found.name, Text()));
    for (uint64_t left = Take<uint64_t>(); left > 0; --left) Take<int32_t>();  // only CUDA has these
    return found;
  }

 private:
  const std::string& bytes_;
  size_t at_ = 0;

  const char* Bytes(uint64_t size) {
    if (bytes_.size() - at_ < size) {
      TVM_FFI_THROW(OpenCLError) << "the OpenCL kernels of this library cannot be read: build it again.";
    }
    at_ += size;
    return bytes_.data() + at_ - size;
  }

  static int Extent(const std::string& kernel, const std::string& tag) {
    for (const auto& start : {std::make_pair("blockIdx.", 0), std::make_pair("threadIdx.", 3)}) {
      size_t size = strlen(start.first);
      if (tag.size() == size + 1 && tag.compare(0, size, start.first) == 0 && tag[size] >= 'x' && tag[size] <= 'z') {
        return start.second + (tag[size] - 'x');
      }
    }
    TVM_FFI_THROW(OpenCLError) << "the kernel '" << kernel << "' asks for '" << tag
                               << "', which OpenCL does not have: build the library again.";
    TVM_FFI_UNREACHABLE();
  }
};

// The kernels of one module, compiled for a device when the first of them runs there.
class OpenCLModule final : public ffi::ModuleObj {
 public:
  explicit OpenCLModule(std::string bytes) : bytes_(std::move(bytes)) {
    Reader reader(bytes_);
    std::string format = reader.Text();
    for (uint64_t left = reader.Take<uint64_t>(); left > 0; --left) signatures_.push_back(reader.TakeSignature());
    source_ = reader.Text();
    std::map<std::string, std::string> sections = Sections();
    for (Signature& signature : signatures_) signature.images = Images(signature, sections[signature.name]);
    if (format != "cl") {
      TVM_FFI_THROW(OpenCLError) << "the OpenCL kernels are in the format '" << format
                                 << "', and only source can be loaded: build the library again.";
    }
  }

  ~OpenCLModule() {
    for (auto& each : compiled_) {
      for (cl_kernel kernel : each.second) Cl().clReleaseKernel(kernel);
    }
  }

  const char* kind() const final { return "opencl"; }
  int GetPropertyMask() const final { return ffi::Module::kBinarySerializable | ffi::Module::kRunnable; }
  ffi::Bytes SaveToBytes() const final { return ffi::Bytes(bytes_); }
  ffi::String InspectSource(const ffi::String&) const final { return source_; }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    for (size_t index = 0; index < signatures_.size(); ++index) {
      if (signatures_[index].name != std::string(name)) continue;
      ffi::ObjectPtr<ffi::Object> self = ffi::GetObjectPtr<ffi::Object>(this);
      return ffi::Function([self, this, index](ffi::PackedArgs args, ffi::Any*) { Launch(index, args); });
    }
    return std::nullopt;
  }

 private:
  std::string bytes_, source_;
  std::vector<Signature> signatures_;
  std::mutex compiling_;
  std::map<int, std::vector<cl_kernel>> compiled_;  // by device, in the order of the signatures

  void Launch(size_t index, ffi::PackedArgs args) {
    const Signature& kernel = signatures_[index];
    if (static_cast<size_t>(args.size()) != kernel.parameters.size() + kernel.extents.size()) {
      TVM_FFI_THROW(OpenCLError) << "the kernel '" << kernel.name << "' was called with " << args.size()
                                 << " arguments: build the library again.";
    }
    Gpu& gpu = Gpus::All().At(Gpus::Current());
    cl_kernel handle = Compiled(gpu, Gpus::Current())[index];
    const TVMFFIAny* values = reinterpret_cast<const TVMFFIAny*>(args.data());
    size_t size[6] = {1, 1, 1, 1, 1, 1};
    for (size_t i = 0; i < kernel.extents.size(); ++i) {
      size[kernel.extents[i]] = values[kernel.parameters.size() + i].v_int64;
    }
    for (int i = 0; i < 3; ++i) size[i] *= size[i + 3];
    std::lock_guard<std::mutex> guard(gpu.lock);
    for (size_t i = 0; i < kernel.parameters.size(); ++i) {
      TVMFFIAny value = values[i];
      if (kernel.images[i]) value.v_ptr = gpu.Image(static_cast<cl_mem>(value.v_ptr), kernel.images[i]);
      gpu.Check(SetArgument(handle, i, kernel.parameters[i], value), "take the arguments of '" + kernel.name + "'");
    }
    cl_int status = Cl().clEnqueueNDRangeKernel(gpu.Queue(), handle, 3, nullptr, size, size + 3, 0, nullptr,
                                                gpu.NewEvent());
    if (status != CL_SUCCESS) gpu.DropEvent();
    gpu.Check(status, "run the kernel '" + kernel.name + "' in work-groups of " + std::to_string(size[3]) + " x " +
                          std::to_string(size[4]) + " x " + std::to_string(size[5]));
  }

  static cl_int SetArgument(cl_kernel kernel, cl_uint index, DLDataType type, const TVMFFIAny& value) {
    if (type.code == kDLFloat && type.bits == 32) {
      float number = static_cast<float>(value.v_float64);
      return Cl().clSetKernelArg(kernel, index, sizeof(number), &number);
    }
    // A pointer is a cl_mem, of a buffer or an image; of an integer, the low bytes come first here.
    return Cl().clSetKernelArg(kernel, index, (type.bits + 7) / 8, &value.v_int64);
  }

  const std::vector<cl_kernel>& Compiled(Gpu& gpu, int device) {
    std::lock_guard<std::mutex> guard(compiling_);
    std::vector<cl_kernel>& kernels = compiled_[device];
    if (!kernels.empty()) return kernels;
    RequireImages(gpu);
    BinaryCache cache(gpu.Identity(), source_);
    kernels = Kernels(FromBinaries(gpu, cache.Load()));
    if (!kernels.empty()) return kernels;
    std::vector<cl_program> programs = FromSource(gpu);
    Binaries binaries;
    for (cl_program program : programs) binaries.push_back(Binary(gpu, program));
    kernels = Kernels(programs);
    gpu.Check(kernels.empty() ? CL_INVALID_KERNEL_NAME : CL_SUCCESS, "find its kernels in what it compiled");
    cache.Store(binaries);
    return kernels;
  }

  void RequireImages(const Gpu& gpu) const {
    for (const Signature& signature : signatures_) {
      bool needed = std::any_of(signature.images.begin(), signature.images.end(), [](cl_uint each) { return each != 0; });
      if (needed && !DeviceNumber<cl_uint>(gpu.id, CL_DEVICE_IMAGE_SUPPORT)) {
        TVM_FFI_THROW(OpenCLError) << "the OpenCL device '" << gpu.name << "' has no images, which the kernel '"
                                   << signature.name << "' reads its weights through: build for another target.";
      }
    }
  }

  // The kernels of one program for all, or of one program each; nothing unless all are there. Takes the programs.
  std::vector<cl_kernel> Kernels(const std::vector<cl_program>& programs) {
    std::vector<cl_kernel> kernels;
    if (programs.size() == 1 || programs.size() == signatures_.size()) {
      for (size_t i = 0; i < signatures_.size(); ++i) {
        cl_int status;
        cl_program program = programs[programs.size() == 1 ? 0 : i];
        cl_kernel kernel = Cl().clCreateKernel(program, signatures_[i].name.c_str(), &status);
        if (status != CL_SUCCESS) break;
        kernels.push_back(kernel);
      }
    }
    for (cl_program program : programs) Cl().clReleaseProgram(program);  // a kernel keeps its own
    if (kernels.size() == signatures_.size()) return kernels;
    for (cl_kernel kernel : kernels) Cl().clReleaseKernel(kernel);
    return {};
  }

  // Nothing unless the driver takes every one.
  static std::vector<cl_program> FromBinaries(Gpu& gpu, const Binaries& binaries) {
    std::vector<cl_program> programs;
    for (const std::string& binary : binaries) {
      const auto* start = reinterpret_cast<const unsigned char*>(binary.data());
      size_t size = binary.size();
      cl_int status, accepted = CL_SUCCESS;
      cl_program program = Cl().clCreateProgramWithBinary(gpu.context, 1, &gpu.id, &size, &start, &accepted, &status);
      if (status == CL_SUCCESS) programs.push_back(program);
      if (status == CL_SUCCESS && accepted == CL_SUCCESS && Build(gpu, program) == CL_SUCCESS) continue;
      for (cl_program each : programs) Cl().clReleaseProgram(each);
      return {};
    }
    return programs;
  }

  static cl_int Build(Gpu& gpu, cl_program program) {
    return Cl().clBuildProgram(program, 1, &gpu.id, "", nullptr, nullptr);
  }

  static cl_program Program(Gpu& gpu, const std::string& source) {
    const char* start = source.data();
    size_t size = source.size();
    cl_int status;
    cl_program program = Cl().clCreateProgramWithSource(gpu.context, 1, &start, &size, &status);
    gpu.Check(status, "take the source of its kernels");
    return program;
  }

  // All kernels at once where the driver can, which is many times faster, else one by one to know which one fails.
  std::vector<cl_program> FromSource(Gpu& gpu) {
    cl_program whole = Program(gpu, source_);
    if (Build(gpu, whole) == CL_SUCCESS) return {whole};
    Cl().clReleaseProgram(whole);
    std::map<std::string, std::string> sections = Sections();
    std::vector<cl_program> programs;
    for (const Signature& signature : signatures_) {
      cl_program program = Program(gpu, sections[signature.name]);
      programs.push_back(program);
      cl_int status = Build(gpu, program);
      if (status == CL_SUCCESS) continue;
      std::string log = BuildLog(program, gpu.id).substr(0, 1000);
      for (cl_program each : programs) Cl().clReleaseProgram(each);
      TVM_FFI_THROW(OpenCLError) << "the OpenCL driver of '" << gpu.name << "' could not compile the kernel '"
                                 << signature.name << "' (" << StatusName(status) << "): " << log;
    }
    return programs;
  }

  static std::string Binary(Gpu& gpu, cl_program program) {
    size_t size = 0;
    gpu.Check(Cl().clGetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, sizeof(size), &size, nullptr), "give a binary");
    std::string binary(size, '\0');
    char* start = &binary[0];
    gpu.Check(Cl().clGetProgramInfo(program, CL_PROGRAM_BINARIES, sizeof(start), &start, nullptr), "give a binary");
    return binary;
  }

  // Which parameters are images, and of what numbers, by the text: "__read_only image1d_buffer_t w /* of half */".
  static std::vector<cl_uint> Images(const Signature& signature, const std::string& section) {
    std::vector<cl_uint> images(signature.parameters.size());
    size_t at = section.find(signature.name + "("), end = section.find(')', at);
    for (size_t i = 0; i < images.size() && at < end; ++i) {
      size_t next = std::min(section.find(',', at + 1), end);
      std::string parameter = section.substr(at, next - at);
      if (parameter.find("image1d_buffer_t") != std::string::npos) {
        images[i] = parameter.find("of half") != std::string::npos ? CL_HALF_FLOAT : CL_FLOAT;
      }
      at = next;
    }
    return images;
  }

  // The compiler writes the kernels one after the other, each complete in itself under a heading.
  std::map<std::string, std::string> Sections() const {
    static const std::string heading = "// Function: ";
    std::map<std::string, std::string> sections;
    for (size_t at = source_.find(heading); at != std::string::npos;) {
      size_t end = source_.find('\n', at), next = source_.find(heading, end);
      std::string name = source_.substr(at + heading.size(), end - at - heading.size());
      sections[name] = source_.substr(at, next == std::string::npos ? next : next - at);
      at = next;
    }
    return sections;
  }
};

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def_packed("device_api.opencl",
                  [](ffi::PackedArgs, ffi::Any* result) {
                    static auto* device = new OpenCLDevice();
                    *result = static_cast<void*>(static_cast<tvm::runtime::DeviceAPI*>(device));
                  })
      .def("saevit.opencl.require", [] { Gpus::All().Require(); })
      .def("runtime.timer.opencl",
           [](DLDevice device) { return tvm::runtime::Timer(ffi::make_object<OpenCLTimer>(device)); })
      .def("ffi.Module.load_from_bytes.opencl", [](const ffi::Bytes& bytes) {
        return ffi::Module(ffi::make_object<OpenCLModule>(std::string(bytes.data(), bytes.size())));
      });
}

}  // namespace saevit
