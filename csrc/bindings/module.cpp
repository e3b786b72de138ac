// The Python module torch_ext._C. It converts types and releases the GIL, and
// leaves every decision to the layers below.

#include <pybind11/pybind11.h>

#include "bind_config.h"
#include "bind_files.h"
#include "bind_model.h"
#include "bind_optimizer.h"
#include "bind_source.h"
#include "bind_state.h"
#include "bind_store.h"
#include "bind_swap.h"
#include "bind_tensor_file.h"
#include "errors.h"
#include "signals.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled half of torch_ext; see the package itself.";
  bind_errors();
  bind_signals(m);
  bind_config(m);
  bind_info(m);
  bind_swap(m);
  bind_files(m);
  bind_tensor_file(m);
  bind_state(m);
  bind_optimizer(m);
  bind_source(m);
  bind_model(m);
  bind_store(m);
}
