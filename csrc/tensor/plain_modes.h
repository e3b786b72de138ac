#pragma once

#include <c10/core/DispatchKeySet.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "one_thread.h"

namespace torch_ext {

/// While it lives, the thread's operators run without autograd, inference mode
/// and autocast, whichever the caller has set. So these change no value. The
/// tensors that are made can be used anywhere. A tensor that is made in
/// inference mode could not be trained outside it.
///
/// The default dtype belongs to the process, not to the thread. So whatever
/// makes a tensor names its dtype and device.
///
/// In a forked child, operators run on the calling thread alone.
class PlainModes {
 public:
  PlainModes() = default;
  PlainModes(const PlainModes&) = delete;
  PlainModes& operator=(const PlainModes&) = delete;

 private:
  const c10::InferenceMode no_inference_{false};
  const c10::NoGradGuard no_grad_;  // After it, which turns autograd on.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_{
      c10::autocast_dispatch_keyset};
  const OneThreadInChild alone_;
};

}  // namespace torch_ext
