// A fiber is a function call that can be left in the middle and taken up again: each emulated CUDA thread is one.
// Fibers share one thread of the operating system, so a block of 128 of them costs no more than its switches, and the
// order in which they run is ours to choose.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__x86_64__) && defined(__linux__) && !defined(MINILLM_PORTABLE_FIBERS)
#define MINILLM_X86_FIBERS 1
#else
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700  // macOS declares ucontext only then
#endif
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 256 * 1024;  // the sanitizer puts room around every variable
inline void clear_marks(char* stack, size_t bytes) { __asan_unpoison_memory_region(stack, bytes); }
#else
constexpr size_t STACK_BYTES = 32 * 1024;
inline void clear_marks(char*, size_t) {}  // of a fiber that was given up in the middle
#endif

#ifdef MINILLM_X86_FIBERS

// Saves what a called function must preserve (System V ABI: rbx, rbp, r12-r15) on this stack, and returns on the other.
__attribute__((naked, noinline)) inline void switch_stacks(void** /* rdi */, void* /* rsi */) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}

class Fiber {
 public:
  void start(void (*entry)()) {
    stack_.resize(STACK_BYTES);
    clear_marks(stack_.data(), STACK_BYTES);
    auto top = reinterpret_cast<uintptr_t>(stack_.data() + STACK_BYTES) & ~uintptr_t{15};
    auto** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;                          // where a return address would be: `entry` never returns
    *--slot = reinterpret_cast<void*>(entry);   // the first switch "returns" to here
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    pointer_ = slot;
  }
  void enter(Fiber& to) { switch_stacks(&pointer_, to.pointer_); }  // leaves this fiber where it stands

 private:
  void* pointer_ = nullptr;
  std::vector<char> stack_;
};

#else  // every other Unix: the same by library calls, slower because they also save the signal mask

class Fiber {
 public:
  void start(void (*entry)()) {
    stack_.resize(4 * STACK_BYTES);
    clear_marks(stack_.data(), 4 * STACK_BYTES);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.data();
    context_.uc_stack.ss_size = 4 * STACK_BYTES;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void enter(Fiber& to) { swapcontext(&context_, &to.context_); }

 private:
  ucontext_t context_;
  std::vector<char> stack_;
};

#endif

}  // namespace emulator
