#include <vernier/kernels/error.h>
#include <vernier/recipes/models/family.h>

#include <set>

namespace vernier {

void ShapeCheck::tensor(const std::string& name, const std::vector<Dimension>& dimensions) const {
  const auto found = shapes_.find(name);
  VERNIER_CHECK(found != shapes_.end(), "tensor '", name, "' is missing");
  const std::vector<int64_t>& shape = found->second;
  VERNIER_CHECK(shape.size() == dimensions.size(), "tensor '", name, "' has shape ",
                at::IntArrayRef(shape), ": it needs ", dimensions.size(), " dimensions");
  for (size_t i = 0; i < shape.size(); ++i)
    VERNIER_CHECK(shape[i] == dimensions[i].size, dimensions[i].field, " is ", dimensions[i].size,
                  " but tensor '", name, "' has shape ", at::IntArrayRef(shape));
}

void ShapeCheck::linear(const std::string& name, const Dimension& out, const Dimension& in,
                        bool bias) const {
  tensor(name + ".weight", {out, in});
  if (bias) tensor(name + ".bias", {out});
}

void ShapeCheck::norm(const std::string& name, const Dimension& size, bool bias) const {
  tensor(name + ".weight", {size});
  if (bias) tensor(name + ".bias", {size});
}

void ShapeCheck::layers(const std::string& prefix, const Dimension& count) const {
  const std::string start = prefix + ".";
  std::set<std::string> stored;  // numbers of layers
  for (const auto& [name, shape] : shapes_)
    if (name.starts_with(start))
      stored.insert(name.substr(start.size(), name.find('.', start.size()) - start.size()));
  VERNIER_CHECK(count.size == static_cast<int64_t>(stored.size()), count.field, " is ", count.size,
                " but there are tensors '", start, "N.*' of ", stored.size(), " layers");
}

}  // namespace vernier
