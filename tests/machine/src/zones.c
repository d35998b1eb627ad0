/* The zones of the allocator, as zprint finds them: a list from first_zone on. */
#include "kernel.h"

struct zone *first_zone;

static const struct {
    const char *name;
    u32 elem_size, alloc_size, cur_size, max_size;
    int count;
} zones[] = {
    {"zones", sizeof(struct zone), 0x8000, 0x8000, 0x8000, 3},
    {"proc", sizeof(struct proc), 0x10000, 0x10000, 0xa0000, 12},
    {"kalloc.64", 64, 0x1000, 0x64000, 0x90000, 5120},
};

void plant_zones(void) {
    struct zone **last = &first_zone;
    for (uptr n = 0; n < countof(zones); n++) {
        struct zone *zone = *last = zalloc(sizeof *zone);
        zone->zone_name = zones[n].name;
        zone->elem_size = zones[n].elem_size;
        zone->alloc_size = zones[n].alloc_size;
        zone->cur_size = zones[n].cur_size;
        zone->max_size = zones[n].max_size;
        zone->count = zones[n].count;
        SET_zone_sum_count(zone, (u32)zones[n].count + 100);
        last = &zone->next_zone;
    }
}

void tell_zones(void) {
    for (const struct zone *zone = first_zone; zone; zone = zone->next_zone) {
        print("{\"kind\": \"zone\", \"name\": \"%s\", \"address\": %p", zone->zone_name, zone);
        print(", \"elem_size\": %u, \"alloc_size\": %u", (u32)zone->elem_size,
              (u32)zone->alloc_size);
        print(", \"cur_size\": %u, \"max_size\": %u, \"in_use\": %d}\n", (u32)zone->cur_size,
              (u32)zone->max_size, zone->count);
    }
}
