// What lets a library that was built on a newer Linux run where a wheel of the kind manylinux_2_28 may be installed:
// with glibc 2.28 and the libstdc++ of GCC 8, in both of which a few functions that today's headers and linkers ask for
// are missing, or have an older version. Each is defined here, for the library alone, by what was there already.
// auditwheel, by which `make wheel` ends, says what is missing here; CMake links this in with ADASPLASH_MANYLINUX.
#include <dlfcn.h>
#include <pthread.h>

#include <ios>
#include <new>
#include <sstream>
#include <string>

#if defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OLDEST "GLIBC_2.17"
#else
#error "the oldest version of glibc's symbols is not known here"
#endif

// ---- glibc: the versions of before 2.29 (mathematics), 2.32 and 2.34 (what became part of libc) ----

#define BEFORE(name) __asm__(".symver before_" #name "," #name "@" OLDEST)

#pragma GCC visibility push(default)
extern "C" {
BEFORE(exp);
BEFORE(log);
BEFORE(pow);
BEFORE(dlopen);
BEFORE(dlsym);
BEFORE(dlerror);
BEFORE(dladdr);
BEFORE(pthread_once);
double before_exp(double);
double before_log(double);
double before_pow(double, double);
void* before_dlopen(const char*, int);
void* before_dlsym(void*, const char*);
char* before_dlerror();
int before_dladdr(const void*, Dl_info*);
int before_pthread_once(pthread_once_t*, void (*)());
}
#pragma GCC visibility pop

#pragma GCC visibility push(hidden)
extern "C" {
double exp(double x) { return before_exp(x); }
double log(double x) { return before_log(x); }
double pow(double x, double y) { return before_pow(x, y); }
void* dlopen(const char* file, int mode) noexcept { return before_dlopen(file, mode); }
void* dlsym(void* handle, const char* name) noexcept { return before_dlsym(handle, name); }
char* dlerror() noexcept { return before_dlerror(); }
int dladdr(const void* address, Dl_info* info) noexcept { return before_dladdr(address, info); }
int pthread_once(pthread_once_t* once, void (*f)()) { return before_pthread_once(once, f); }

char __libc_single_threaded = 0;  // "there may be other threads", which is always safe
}

// ---- libstdc++: what came after GLIBCXX_3.4.24 and CXXABI_1.3.11 ----

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

extern "C" {
// std::ostringstream::ostringstream()
void adasplash_make_ostringstream(void* self) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void adasplash_make_ostringstream(void* self) { new (self) std::ostringstream(std::ios_base::out); }

// std::exception_ptr's count of references, by its copy constructor and destructor, which is where older ones count.
[[gnu::visibility("default")]] void copy_exception_ptr(void* self, const void* other) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
[[gnu::visibility("default")]] void destroy_exception_ptr(void* self) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrD1Ev");
void adasplash_add_reference(void* self) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void adasplash_release(void** self) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void adasplash_add_reference(void* self) {
  void* copy;  // which is never destroyed
  copy_exception_ptr(&copy, self);
}
void adasplash_release(void** self) {
  destroy_exception_ptr(self);
  *self = nullptr;
}
}

// std::stringbuf::str() const & and str() &&, as C++20 calls them; as C++17 does it has another name. The second may
// leave the text where it is, as nobody reads what was moved from.
[[gnu::visibility("default")]] std::string text_of(const void* self) __asm__(
    "_ZNKSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string adasplash_text_of(const void* self) __asm__(
    "_ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string adasplash_text_from(const void* self) __asm__(
    "_ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string adasplash_text_of(const void* self) { return text_of(self); }
std::string adasplash_text_from(const void* self) { return text_of(self); }

#pragma GCC visibility pop
