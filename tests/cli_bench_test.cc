// `vernier bench` on the CPU: what it reports, draws and refuses.
#include <vernier/tests/cli_program.h>

#include <fstream>
#include <set>
#include <sstream>

namespace vernier::testing {
namespace {

Arguments bench(const Arguments& more) {
  return Arguments{"bench", "--device", "cpu", "--quick", "--seconds", "0"} + more;
}

std::string text_of(const fs::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// Tags closed in the order in which they were opened, attributes quoted, no bare & or <: all that
// these files need of XML.
void expect_well_formed(const std::string& xml) {
  std::vector<std::string> open;
  size_t elements = 0;
  for (size_t at = 0; at < xml.size();) {
    if (xml[at] == '&') {
      const std::string rest = xml.substr(at, 6);
      EXPECT_TRUE(rest.starts_with("&amp;") || rest.starts_with("&lt;") ||
                  rest.starts_with("&gt;") || rest.starts_with("&quot;"))
          << rest;
    }
    if (xml[at] != '<') {
      EXPECT_NE(xml[at], '>');
      ++at;
      continue;
    }
    const size_t end = xml.find('>', at);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = xml.substr(at + 1, end - at - 1);
    ASSERT_FALSE(tag.empty());
    EXPECT_EQ(tag.find('<'), std::string::npos) << tag;
    EXPECT_EQ(std::count(tag.begin(), tag.end(), '"') % 2, 0) << tag;
    if (tag[0] == '/') {
      ASSERT_FALSE(open.empty()) << tag;
      EXPECT_EQ(open.back(), tag.substr(1));
      open.pop_back();
    } else {
      ++elements;
      if (tag.back() != '/') open.push_back(tag.substr(0, tag.find(' ')));
    }
    at = end + 1;
  }
  EXPECT_TRUE(open.empty());
  EXPECT_GT(elements, 10u);
}

TEST(CliBench, ReportsEveryWorkWithItsBaseline) {
  const Json json = run_json(bench({}));
  EXPECT_FALSE(json["device"].get<std::string>().empty());
  for (const char* name : {"cuda", "driver", "cublas", "torch", "vernier"})
    EXPECT_TRUE(json["versions"].contains(name)) << name;
  EXPECT_TRUE(json["versions"]["torch"].is_string());
  EXPECT_EQ(json["date"].get<std::string>().size(), 20u);
  EXPECT_FALSE(json.contains("failures")) << json["failures"];

  std::set<std::string> ours, keys;
  std::string before;
  for (const Json& row : json["rows"]) {
    const std::string work = row["work"], shape = row["shape"],
                      implementation = row["implementation"];
    SCOPED_TRACE(concat(work, " ", shape, " ", implementation));
    EXPECT_TRUE(keys.insert(concat(work, "|", shape, "|", implementation)).second);
    EXPECT_GT(row["us"].get<double>(), 0);
    EXPECT_NE(row.contains("tops"), row.contains("gbs"));
    EXPECT_TRUE(row["speedup"].is_number());
    if (before != work + shape) {
      EXPECT_EQ(row["speedup"], 1) << "a baseline comes first";
    }
    before = work + shape;
    if (implementation == "vernier") ours.insert(work);
  }
  for (const char* work : {"w8a8_gemm", "w8a8_int8_out", "quantize_gemm", "fake_quantize",
                           "quantize", "histogram", "qat_linear", "qat_block", "prefill"})
    EXPECT_TRUE(ours.contains(work)) << work;
}

TEST(CliBench, TakesWorksAndShapes) {
  // Sizes that are no multiple of anything, and one row.
  const Json gemm = run_json(bench({"quantize_gemm", "--shape", "33x70x19", "--shape", "1x3x1"}));
  std::set<std::string> shapes;
  for (const Json& row : gemm["rows"]) {
    EXPECT_EQ(row["work"], "quantize_gemm");
    shapes.insert(row["shape"]);
    if (row["implementation"] == "vernier") {
      EXPECT_TRUE(row["steps_us"].contains("GEMM"));
    }
  }
  EXPECT_EQ(shapes, (std::set<std::string>{"33x70x19", "1x3x1"}));
  const Json rows = run_json(bench({"histogram", "--shape", "7x13"}));
  shapes.clear();
  for (const Json& row : rows["rows"]) shapes.insert(row["shape"]);
  EXPECT_EQ(shapes, (std::set<std::string>{"7x13", "7x13 bf16"}));
}

TEST(CliBench, TakesTheBeginningOfSeveralNames) {
  const Json json = run_json(bench({"qat", "--shape", "18x256x23"}));
  EXPECT_FALSE(json.contains("failures")) << json["failures"];
  std::set<std::string> ours;
  for (const Json& row : json["rows"]) {
    EXPECT_EQ(row["shape"], "18x256x23");
    if (row["work"] == "qat_linear") ours.insert(row["implementation"]);
  }
  for (const char* name :
       {"plain bf16", "vernier", "vernier, learned scales", "vernier, following weights",
        "vernier, int8 forward", "vernier, one by one", "torch fake_quantize"})
    EXPECT_TRUE(ours.contains(name)) << name;
}

TEST(CliBench, ReadsPrompts) {
  const Json json = run_json(bench({"prefill", "--shape", "3x17"}));
  EXPECT_FALSE(json.contains("failures")) << json["failures"];
  std::set<std::string> implementations;
  for (const Json& row : json["rows"]) {
    implementations.insert(row["implementation"]);
    EXPECT_NEAR(row["tokens_a_second"].get<double>() * row["us"].get<double>(), 3 * 17 * 1e6, 1e5);
  }
  EXPECT_EQ(implementations, (std::set<std::string>{"bf16", "vernier", "vernier, per token"}));
}

TEST(CliBench, DrawsAndPrints) {
  const TemporaryFolder folder;
  const std::string pictures = folder / "new/pictures";
  const Outcome outcome = run(bench({"quantize_gemm", "quantize", "--plot", pictures}));
  ASSERT_EQ(outcome.code(), 0) << outcome.err;
  EXPECT_CONTAINS(outcome.out, "quantize_gemm 64x256x128\n");
  EXPECT_CONTAINS(outcome.out, "vernier");
  EXPECT_CONTAINS(outcome.out, "1.00x");
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(pictures)) {
    SCOPED_TRACE(entry.path());
    names.insert(entry.path().filename());
    const std::string svg = text_of(entry.path());
    EXPECT_TRUE(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
    EXPECT_EQ(svg.find("nan"), std::string::npos);
    EXPECT_EQ(svg.find("inf"), std::string::npos);
    EXPECT_CONTAINS(svg, entry.path().filename() == "tops.svg" ? ">quantize_gemm<" : ">vernier<");
    expect_well_formed(svg);
  }
  EXPECT_EQ(names, (std::set<std::string>{"speedup_quantize_gemm.svg", "speedup_quantize.svg",
                                          "breakdown.svg", "tops.svg", "bandwidth.svg"}));
}

TEST(CliBench, RefusesMistakes) {
  const TemporaryFolder folder;
  const std::string file = folder / "file";
  std::ofstream(file) << "text";
  const std::vector<std::pair<Arguments, std::string>> cases = {
      {{"w8a9_gemm"}, "unknown work 'w8a9_gemm': use w8a8_gemm, "},
      {{"quantize", "--shape", "64x0"}, "--shape '64x0': give MxKxN"},
      {{"quantize", "--shape", "64x64x64x64"}, "--shape '64x64x64x64'"},
      {{"quantize", "--shape", "99999999999999999999x1"}, "--shape '9999"},
      {{"quantize", "--shape", "64x64x64"}, "quantize takes --shape MxK, not 64x64x64"},
      {{"w8a8_gemm", "--shape", "64x64"}, "w8a8_gemm takes --shape MxKxN, not 64x64"},
      {{"w8a8_gemm", "--shape", "1x140000x1"}, "could overflow the int32 accumulators"},
      {{"fp8_gemm"}, "fp8_gemm needs a GPU"},
      {{"quantize", "--seconds", "-1"}, "--seconds must be between"},
      {{"quantize", "--plot", file + "/in"}, "--plot " + file + "/in"},
  };
  for (const auto& [arguments, part] : cases) {
    SCOPED_TRACE(part);
    expect_refused(run(Arguments{"bench", "--device", "cpu"} + arguments), part);
  }
}

}  // namespace
}  // namespace vernier::testing
