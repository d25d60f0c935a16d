// What the files of the stand-in share.
#define EXPORT __attribute__((visibility("default")))

// The memory of the card: an H100 of 80 GiB.
#define CARD_BYTES (80ull << 30)

// Add one call of `name`, and bytes to its sum. nogpu_report prints all sums.
void count(const char *name, long bytes);

// The same for something that would run on the card. While a CUDA graph is captured it becomes a
// node of that graph.
void count_on_card(const char *name, long bytes);

// A name for a kernel, which is known by its address.
void name_kernel(const void *kernel, const char *name);

// Count the launch of a kernel.
int launch(const void *kernel);

// Whether a CUDA graph is captured now.
int is_capturing(void);

// Whether `address` belongs to the card (2), to pinned memory (1), or to neither (0).
int kind_of_memory(const void *address);

// The number that the card has for an attribute of the driver's list.
int card_attribute(int attribute);
