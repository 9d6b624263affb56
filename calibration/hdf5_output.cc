#include <vernier/calibration/hdf5_output.h>

#include <fcntl.h>
#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>

namespace vernier::hdf5 {
namespace {

/// The driver's view of an open file; the library's part stands first.
struct OutputFile {
  H5FD_t base{};
  int descriptor = -1;
  dev_t device = 0;
  ino_t inode = 0;
  haddr_t allocated = 0;  // The end of what the library has given out: "eoa".
  haddr_t end = 0;        // The end of the file: "eof".
  WriteFailure* failure = nullptr;
};

OutputFile& output(H5FD_t* file) { return *reinterpret_cast<OutputFile*>(file); }
const OutputFile& output(const H5FD_t* file) { return *reinterpret_cast<const OutputFile*>(file); }

H5FD_t* open_output(const char* name, unsigned flags, hid_t access, haddr_t) {
  const void* info = H5Pget_driver_info(access);
  if (info == nullptr) return nullptr;
  const int mode = ((flags & H5F_ACC_RDWR) != 0 ? O_RDWR : O_RDONLY) |
                   ((flags & H5F_ACC_TRUNC) != 0 ? O_TRUNC : 0) |
                   ((flags & H5F_ACC_CREAT) != 0 ? O_CREAT : 0) |
                   ((flags & H5F_ACC_EXCL) != 0 ? O_EXCL : 0);
  const int descriptor = ::open(name, mode | O_CLOEXEC, 0666);
  if (descriptor < 0) return nullptr;
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) {
    ::close(descriptor);
    return nullptr;
  }
  auto* file = new OutputFile;
  file->descriptor = descriptor;
  file->device = status.st_dev;
  file->inode = status.st_ino;
  file->end = static_cast<haddr_t>(status.st_size);
  std::memcpy(&file->failure, info, sizeof file->failure);
  return &file->base;
}

herr_t close_output(H5FD_t* base) {
  OutputFile* file = &output(base);
  if (::close(file->descriptor) != 0 && errno != EINTR) file->failure->note(errno);
  delete file;
  return 0;
}

int compare_outputs(const H5FD_t* a, const H5FD_t* b) {
  const auto key = [](const H5FD_t* file) {
    return std::pair(output(file).device, output(file).inode);
  };
  return key(a) < key(b) ? -1 : key(b) < key(a) ? 1 : 0;
}

herr_t query_output(const H5FD_t*, unsigned long* features) {
  if (features != nullptr)
    *features = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA |
                H5FD_FEAT_DATA_SIEVE | H5FD_FEAT_AGGREGATE_SMALLDATA |
                H5FD_FEAT_POSIX_COMPAT_HANDLE | H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
  return 0;
}

herr_t read_output(H5FD_t* base, H5FD_mem_t, hid_t, haddr_t address, std::size_t bytes, void* out) {
  auto* next = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(output(base).descriptor, next, bytes, static_cast<off_t>(address));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) {  // What was never written reads as zeros.
      std::memset(next, 0, bytes);
      return 0;
    }
    next += got;
    address += static_cast<haddr_t>(got);
    bytes -= static_cast<std::size_t>(got);
  }
  return 0;
}

herr_t write_output(H5FD_t* base, H5FD_mem_t, hid_t, haddr_t address, std::size_t bytes,
                    const void* data) {
  OutputFile& file = output(base);
  file.end = std::max(file.end, address + bytes);
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0 && file.failure->error == 0) {
    const ssize_t put = ::pwrite(file.descriptor, next, bytes, static_cast<off_t>(address));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) {
      file.failure->note(errno);
      break;
    }
    next += put;
    address += static_cast<haddr_t>(put);
    bytes -= static_cast<std::size_t>(put);
  }
  return 0;
}

herr_t truncate_output(H5FD_t* base, hid_t, hbool_t) {
  OutputFile& file = output(base);
  if (file.end == file.allocated) return 0;
  if (file.failure->error == 0 &&
      ::ftruncate(file.descriptor, static_cast<off_t>(file.allocated)) != 0)
    file.failure->note(errno);
  file.end = file.allocated;
  return 0;
}

herr_t output_handle(H5FD_t* base, hid_t, void** handle) {
  *handle = &output(base).descriptor;
  return 0;
}

hid_t output_driver() {
  static const hid_t driver = [] {
    H5FD_class_t methods{};
#ifdef H5FD_CLASS_VERSION
    methods.version = H5FD_CLASS_VERSION;
    methods.value = static_cast<H5FD_class_value_t>(H5_VFD_RESERVED + 1);
#endif
    methods.name = "vernier";
    methods.maxaddr = static_cast<haddr_t>(std::numeric_limits<off_t>::max());
    methods.fc_degree = H5F_CLOSE_STRONG;
    methods.fapl_size = sizeof(WriteFailure*);
    methods.open = open_output;
    methods.close = close_output;
    methods.cmp = compare_outputs;
    methods.query = query_output;
    methods.get_eoa = [](const H5FD_t* file, H5FD_mem_t) { return output(file).allocated; };
    methods.set_eoa = [](H5FD_t* file, H5FD_mem_t, haddr_t address) -> herr_t {
      output(file).allocated = address;
      return 0;
    };
    methods.get_eof = [](const H5FD_t* file, H5FD_mem_t) { return output(file).end; };
    methods.get_handle = output_handle;
    methods.read = read_output;
    methods.write = write_output;
    methods.truncate = truncate_output;
    const H5FD_mem_t map[H5FD_MEM_NTYPES] = H5FD_FLMAP_DICHOTOMY;
    std::copy(std::begin(map), std::end(map), std::begin(methods.fl_map));
    return H5FDregister(&methods);
  }();
  return driver;
}

}  // namespace

bool use_output_driver(hid_t access, WriteFailure& failure) {
  WriteFailure* const pointer = &failure;
  // The driver's information is this pointer; HDF5 copies it from where it is told to.
  return H5Pset_driver(access, output_driver(), &pointer) >= 0;
}

}  // namespace vernier::hdf5
