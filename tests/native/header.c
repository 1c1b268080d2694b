/* The header by itself, as C11 and as C++17: everything in it can be named. */
#include "tinyllama.h"

tl_status open_default(tl_model** model);

tl_status open_default(tl_model** model) {
    tl_model_def def = tl_default_model_def();
    tl_scheduler_def crowd = tl_default_scheduler_def();
    tl_request_def request = tl_default_request_def();
    tl_event event;
    (void)crowd;
    (void)request;
    (void)tl_scheduler_next_event(NULL, &event);
    return tl_model_open(&def, model);
}
