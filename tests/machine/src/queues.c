/* Lists as the kernel keeps them. */
#include "kernel.h"

static struct list_entry *list_link(void *element, uptr link) {
    return (struct list_entry *)((char *)element + link);
}

void list_insert_head(void **head, void *element, uptr link) {
    struct list_entry *own = list_link(element, link);
    own->le_next = *head;
    if (*head)
        list_link(*head, link)->le_prev = &own->le_next;
    *head = element;
    own->le_prev = head;
}

void tailq_insert_tail(struct tailq_head *head, void *element, uptr link) {
    struct list_entry *own = list_link(element, link);
    if (!head->tqh_last)
        head->tqh_last = &head->tqh_first;
    own->le_next = NULL;
    own->le_prev = head->tqh_last;
    *head->tqh_last = element;
    head->tqh_last = &own->le_next;
}

static struct queue_entry *chain(void *element, uptr link) {
    return (struct queue_entry *)((char *)element + link);
}

void queue_init(struct queue_entry *head) {
    head->next = head->prev = head;
}

/* queue_enter: links point at elements, but the ends at the head. */
void queue_enter(struct queue_entry *head, void *element, uptr link) {
    void *last = head->prev;
    if (last == head)
        head->next = element;
    else
        chain(last, link)->next = element;
    chain(element, link)->prev = last;
    chain(element, link)->next = head;
    head->prev = element;
}
