#include <vernier/calibration/hdf5_library.h>

#include <algorithm>
#include <array>
#include <cstdlib>

namespace vernier::hdf5 {
namespace {

std::recursive_mutex& library_mutex() {
  static auto* const mutex = new std::recursive_mutex;  // Never destroyed: Files may be static.
  return *mutex;
}

struct TypeName {
  ElementType type;
  const char* name;
};
constexpr std::array<TypeName, 15> kTypeNames{{
    {ElementType::boolean, "bool"},
    {ElementType::int8, "int8"},
    {ElementType::uint8, "uint8"},
    {ElementType::int16, "int16"},
    {ElementType::uint16, "uint16"},
    {ElementType::int32, "int32"},
    {ElementType::uint32, "uint32"},
    {ElementType::int64, "int64"},
    {ElementType::uint64, "uint64"},
    {ElementType::float16, "float16"},
    {ElementType::bfloat16, "bfloat16"},
    {ElementType::float32, "float32"},
    {ElementType::float64, "float64"},
    {ElementType::text, "text"},
    {ElementType::other, "an unsupported type"},
}};

/// Bit layout of the float formats: exponent bits, mantissa bits; the sign is the highest bit.
struct FloatLayout {
  ElementType type;
  std::size_t bytes, exponent, mantissa;
};
constexpr std::array<FloatLayout, 4> kFloats{{
    {ElementType::float16, 2, 5, 10},
    {ElementType::bfloat16, 2, 8, 7},
    {ElementType::float32, 4, 8, 23},
    {ElementType::float64, 8, 11, 52},
}};

ElementType classify_integer(hid_t type) {
  const std::size_t bytes = H5Tget_size(type);
  if (H5Tget_precision(type) != 8 * bytes) return ElementType::other;
  const bool is_signed = H5Tget_sign(type) == H5T_SGN_2;
  switch (bytes) {
    case 1:
      return is_signed ? ElementType::int8 : ElementType::uint8;
    case 2:
      return is_signed ? ElementType::int16 : ElementType::uint16;
    case 4:
      return is_signed ? ElementType::int32 : ElementType::uint32;
    case 8:
      return is_signed ? ElementType::int64 : ElementType::uint64;
    default:
      return ElementType::other;
  }
}

ElementType classify_float(hid_t type) {
  std::size_t sign = 0, exponent_at = 0, exponent = 0, mantissa_at = 0, mantissa = 0;
  if (H5Tget_fields(type, &sign, &exponent_at, &exponent, &mantissa_at, &mantissa) < 0)
    return ElementType::other;
  for (const FloatLayout& layout : kFloats) {
    const bool same = H5Tget_size(type) == layout.bytes &&
                      H5Tget_precision(type) == 8 * layout.bytes && mantissa_at == 0 &&
                      mantissa == layout.mantissa && exponent_at == layout.mantissa &&
                      exponent == layout.exponent && sign == 8 * layout.bytes - 1 &&
                      H5Tget_ebias(type) == (std::size_t{1} << (exponent - 1)) - 1 &&
                      H5Tget_norm(type) == H5T_NORM_IMPLIED;
    if (same) return layout.type;
  }
  return ElementType::other;
}

}  // namespace

std::string printable(std::string_view text) {
  std::size_t length = std::min<std::size_t>(text.size(), 300);
  // Not through the middle of a UTF-8 character.
  while (length < text.size() && length > 0 && (text[length] & 0xc0) == 0x80) --length;
  std::string out(text.substr(0, length));
  if (length < text.size()) out += "...";
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return out;
}

Call::Call() : lock_(library_mutex()) {
  // A damaged file leaves memory behind in the library, of which it complains on stderr as the
  // program exits. Handlers run in reverse order: one set after the library's mutes it in time.
  [[maybe_unused]] static const bool muted_at_exit =
      H5open() >= 0 && std::atexit([] { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }) == 0;
  H5Eget_auto2(H5E_DEFAULT, &function_, &data_);
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

Call::~Call() {
  H5Eclear2(H5E_DEFAULT);
  H5Eset_auto2(H5E_DEFAULT, function_, data_);
}

std::string library_reason() {
  std::string reason;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
        auto& text = *static_cast<std::string*>(out);
        if (text.empty() && error->desc != nullptr) text = error->desc;
        return 0;
      },
      &reason);
  return reason.empty() ? "HDF5 gives no reason" : "HDF5: " + printable(reason);
}

const char* element_type_name(ElementType type) {
  for (const TypeName& entry : kTypeNames)
    if (entry.type == type) return entry.name;
  return "an unsupported type";
}

bool is_integer(ElementType type) {
  return type >= ElementType::boolean && type <= ElementType::uint64;
}

bool is_float(ElementType type) {
  return type >= ElementType::float16 && type <= ElementType::float64;
}

Handle half_type(ElementType format) {
  const FloatLayout& layout = format == ElementType::float16 ? kFloats[0] : kFloats[1];
  // Fields first, size last: HDF5 refuses a size that does not hold the current fields.
  Handle type(H5Tcopy(H5T_IEEE_F32LE), H5Tclose);
  const bool ok =
      type.ok() &&
      H5Tset_fields(type.id(), 15, layout.mantissa, layout.exponent, 0, layout.mantissa) >= 0 &&
      H5Tset_precision(type.id(), 16) >= 0 &&
      H5Tset_ebias(type.id(), (std::size_t{1} << (layout.exponent - 1)) - 1) >= 0 &&
      H5Tset_size(type.id(), 2) >= 0;
  return ok ? std::move(type) : Handle();
}

Handle boolean_type() {
  Handle type(H5Tenum_create(H5T_STD_I8LE), H5Tclose);
  const int8_t no = 0;
  const int8_t yes = 1;
  const bool ok = type.ok() && H5Tenum_insert(type.id(), "FALSE", &no) >= 0 &&
                  H5Tenum_insert(type.id(), "TRUE", &yes) >= 0;
  return ok ? std::move(type) : Handle();
}

Handle text_type() {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  const bool ok = type.ok() && H5Tset_size(type.id(), H5T_VARIABLE) >= 0 &&
                  H5Tset_cset(type.id(), H5T_CSET_UTF8) >= 0;
  return ok ? std::move(type) : Handle();
}

ElementType classify(hid_t type) {
  switch (H5Tget_class(type)) {
    case H5T_INTEGER:
      return classify_integer(type);
    case H5T_FLOAT:
      return classify_float(type);
    case H5T_STRING:
      return ElementType::text;
    case H5T_ENUM: {
      int8_t no = -1;
      int8_t yes = -1;
      // The values are read as one byte, so the sizes come first: the enumeration's, and that of
      // its integer, which in a damaged file can differ.
      const Handle base(H5Tget_super(type), H5Tclose);
      const bool same = base.ok() && H5Tget_size(base.id()) == 1 && H5Tget_size(type) == 1 &&
                        H5Tget_class(base.id()) == H5T_INTEGER && H5Tget_nmembers(type) == 2 &&
                        H5Tenum_valueof(type, "FALSE", &no) >= 0 &&
                        H5Tenum_valueof(type, "TRUE", &yes) >= 0 && no == 0 && yes == 1;
      return same ? ElementType::boolean : ElementType::other;
    }
    default:
      return ElementType::other;
  }
}

}  // namespace vernier::hdf5
