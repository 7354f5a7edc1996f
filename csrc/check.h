// Checks of arguments at the border to torch.
#pragma once

#include <sstream>
#include <stdexcept>

namespace superbert {

// Raises ValueError in Python, with the parts put together as its message.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

} // namespace superbert
