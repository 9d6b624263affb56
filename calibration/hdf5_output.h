// Internal: the driver through which Vernier writes HDF5 files.
#pragma once

#include <hdf5.h>

namespace vernier::hdf5 {

/// The error number of the first write that failed; 0 while none has.
struct WriteFailure {
  int error = 0;

  void note(int number) {
    if (error == 0) error = number;
  }
};

/// Lets files that are created with the property list `access` be written through Vernier's driver,
/// for one reason: when the library cannot write what it still holds as a file closes (the disk is
/// full), HDF5 1.10.8 keeps the identifier of the half closed file and crashes on it as the program
/// exits. So the driver notes the first failure in `failure`, which has to outlive the file, tells
/// the library that all is well, and File throws what was noted. False when HDF5 refuses.
bool use_output_driver(hid_t access, WriteFailure& failure);

}  // namespace vernier::hdf5
