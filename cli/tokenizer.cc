#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vernier/cli/tokenizer.h>
#include <vernier/kernels/error.h>
#include <nlohmann/json.hpp>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

namespace vernier::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

File temporary_file() {
  File file(std::tmpfile(), std::fclose);
  VERNIER_CHECK(file, "no temporary file can be made: ", std::strerror(errno));
  return file;
}

std::string contents(std::FILE& file) {
  std::string text;
  std::rewind(&file);
  for (int c = std::fgetc(&file); c != EOF; c = std::fgetc(&file)) text += static_cast<char>(c);
  return text;
}

// The script's answer to `input`, both JSON.
Json ask(const char* what, const std::string& folder, const Json& input) {
  const fs::path script = fs::path(VERNIER_TOOLS) / "tokenizer.py";
  VERNIER_CHECK(fs::exists(script), script.string(),
                " is missing: give ids with --prompt-ids, which needs no tokenizer");
  // The interpreter that tools/setup.sh gave what the script needs, where it did.
  const fs::path own = fs::path(VERNIER_TOOLS) / "../.deps/venv/bin/python";
  const std::string python = fs::exists(own) ? own.string() : "python3";

  const File in = temporary_file(), out = temporary_file(), err = temporary_file();
  const std::string text = input.dump(-1, ' ', false, Json::error_handler_t::replace);
  VERNIER_CHECK(std::fwrite(text.data(), 1, text.size(), in.get()) == text.size() &&
                    std::fflush(in.get()) == 0,
                "a temporary file cannot be written: ", std::strerror(errno));
  std::rewind(in.get());
  std::vector<std::string> words = {python, script.string(), what, folder};
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, fileno(in.get()), STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, fileno(out.get()), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, fileno(err.get()), STDERR_FILENO);
  pid_t process = -1;
  const int error =
      posix_spawnp(&process, python.c_str(), &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  VERNIER_CHECK(error == 0, python, " cannot be run: ", std::strerror(error),
                ": install Python, or give ids with --prompt-ids");
  int status = 0;
  while (waitpid(process, &status, 0) < 0)
    VERNIER_CHECK(errno == EINTR, "waiting for ", python, " failed: ", std::strerror(errno));
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    const std::string said = contents(*err);
    const size_t last = said.find_last_not_of('\n');
    const size_t line = last == std::string::npos ? 0 : said.rfind('\n', last) + 1;
    throw Error(last == std::string::npos ? concat(script.string(), " failed")
                                          : said.substr(line, last + 1 - line));
  }
  const Json answer = Json::parse(contents(*out), nullptr, /*allow_exceptions=*/false);
  VERNIER_CHECK(answer.is_array() && answer.size() == input.size(), script.string(),
                " gave no answer that can be read");
  return answer;
}

}  // namespace

std::vector<std::vector<int64_t>> encode_texts(const std::string& folder,
                                               const std::vector<std::string>& texts) {
  return ask("encode", folder, texts).get<std::vector<std::vector<int64_t>>>();
}

std::vector<std::string> decode_ids(const std::string& folder,
                                    const std::vector<std::vector<int64_t>>& ids) {
  return ask("decode", folder, ids).get<std::vector<std::string>>();
}

}  // namespace vernier::cli
