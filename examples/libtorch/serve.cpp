// Continues texts with a saved model, many at once: serve_torchscript and serve_aoti, by what they load.
#include <c10/core/InferenceMode.h>

#include <charconv>
#include <chrono>
#include <exception>
#include <iostream>
#include <iterator>

#include "server.h"

namespace {

constexpr int64_t kSequences = 8;  // on their way at once

constexpr const char* kUsage =
    " MODEL COUNT [--lines] < prompts\n"
    "Continues what standard input holds by COUNT bytes, each the likeliest one, and writes them as they come.\n"
    "With --lines every line of it that is not empty is a request, up to 8 are on their way at once, and for each byte "
    "there is a line:\n"
    "the number of its request, from 0, and the byte, from 0 to 255. How fast it went is told on standard error.\n";

std::vector<std::string> ReadRequests(bool lines) {
  if (!lines) return {std::string{std::istreambuf_iterator<char>(std::cin), {}}};
  std::vector<std::string> requests;
  for (std::string line; std::getline(std::cin, line);) {
    if (!line.empty()) requests.push_back(line);
  }
  return requests;
}

void Serve(const std::string& path, int64_t count, bool lines) {
  const c10::InferenceMode inference;
  const std::vector<std::string> requests = ReadRequests(lines);
  int64_t pages = 2;  // an exported model takes no fewer
  for (const std::string& prompt : requests) pages += Server::PagesFor(prompt.size() + count);
  Server server(LoadModel(path), pages, kSequences);
  for (size_t number = 0; number < requests.size(); ++number) server.Add(number, requests[number], count);
  const auto started = std::chrono::steady_clock::now();
  int64_t written = 0;
  server.Run([&](int64_t number, uint8_t byte) {
    if (lines) {
      std::cout << number << ' ' << int{byte} << std::endl;
    } else {
      std::cout << static_cast<char>(byte) << std::flush;
    }
    ++written;
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
  std::cerr << written << " tokens in " << took.count() << " s: " << written / took.count() << " tokens a second\n";
}

}  // namespace

int main(int argc, char** argv) {
  const bool lines = argc == 4 && std::string(argv[3]) == "--lines";
  if (argc != 3 && !lines) {
    std::cerr << "Usage: " << argv[0] << kUsage;
    return argc == 2 && std::string(argv[1]) == "--help" ? 0 : 2;
  }
  try {
    const std::string number = argv[2];
    int64_t count = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), count);
    TORCH_CHECK(error == std::errc() && end == number.data() + number.size() && count > 0,
                "COUNT must be a whole number above zero, got ", number);
    Serve(argv[1], count, lines);
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
