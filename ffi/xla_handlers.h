// The computations as XLA FFI handlers.
#ifndef JAXNSA_XLA_HANDLERS_H_
#define JAXNSA_XLA_HANDLERS_H_

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jaxnsa {

struct XlaHandler {
  const char* name;
  XLA_FFI_Handler* handler;
};

std::vector<XlaHandler> XlaHandlers();

}  // namespace jaxnsa

#endif  // JAXNSA_XLA_HANDLERS_H_
