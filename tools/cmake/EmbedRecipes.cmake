# Writes builtin_recipes.cc into the build tree: the texts of recipes/*.yaml as one C++ table.
function(vernier_embed_recipes out)
  file(GLOB recipe_files CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/recipes/*.yaml")
  set(entries "")
  foreach(file IN LISTS recipe_files)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
    get_filename_component(name "${file}" NAME_WE)
    file(READ "${file}" text)
    string(APPEND entries "      {\"${name}\", R\"recipe(${text})recipe\"},\n")
  endforeach()
  set(generated "${PROJECT_BINARY_DIR}/generated/builtin_recipes.cc")
  file(CONFIGURE OUTPUT "${generated}" @ONLY CONTENT
"#include <vernier/recipes/builtin_recipes.h>

namespace vernier {

const std::vector<std::pair<std::string, std::string>>& builtin_recipes() {
  static const std::vector<std::pair<std::string, std::string>> recipes = {
@entries@  };
  return recipes;
}

}  // namespace vernier
")
  set(${out} "${generated}" PARENT_SCOPE)
endfunction()
